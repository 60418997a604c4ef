"""How the caches' loops are compiled: by numba, kept from run to run where there is a folder for
it.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("sngpt_jax")


def compiled(function: F) -> F:
    """`function` compiled at its first call, without Python's lock; a division by zero gives
    infinity or NaN, as numpy's.
    """
    try:
        return cast(F, njit(function, nogil=True, error_model="numpy", cache=True))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        _announce()
        return cast(F, njit(function, nogil=True, error_model="numpy"))


@functools.cache
def _announce() -> None:
    logger.info(
        "numba: no folder to keep compiled loops in, so they are compiled in every run"
        " (NUMBA_CACHE_DIR names one)"
    )
