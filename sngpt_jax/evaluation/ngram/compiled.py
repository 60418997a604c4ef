"""How the caches' loops are compiled: by numba, and stored for later runs if there is a folder."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("sngpt_jax")


def compiled(function: F) -> F:
    """`function`, compiled at its first call, run without Python's lock. Numbers are divided by
    zero as in numpy.
    """
    compile_it = functools.partial(njit, function, nogil=True, error_model="numpy")
    try:
        return cast(F, compile_it(cache=True))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        _announce()
        return cast(F, compile_it())


@functools.cache
def _announce() -> None:
    logger.info(
        "numba finds no folder for compiled loops, so every run compiles them; NUMBA_CACHE_DIR"
        " names a folder"
    )


@compiled
def scrambled(h: np.uint64) -> np.uint64:
    """A hash in which every bit depends on all bits of h (the finalizer of SplitMix64)."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))
