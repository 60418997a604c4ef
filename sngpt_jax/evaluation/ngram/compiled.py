"""How the caches' loops are compiled: by numba, and stored for later runs if there is a folder."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("sngpt_jax")


def compiled(function: F) -> F:
    """`function`, compiled at its first call, run without Python's lock; a division by zero gives
    infinity or NaN as in numpy.
    """
    try:
        return cast(F, njit(function, nogil=True, error_model="numpy", cache=True))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        _announce()
        return cast(F, njit(function, nogil=True, error_model="numpy"))


@functools.cache
def _announce() -> None:
    logger.info(
        "numba finds no folder for compiled loops, so every run compiles them; NUMBA_CACHE_DIR"
        " names a folder"
    )
