"""Parts of the Triton kernels that sum signed atoms: block sizes, words of signs, flips."""

import functools
import operator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from sngpt_kernels import dispatch
from sngpt_kernels.cayley.api import tuned_entry
from sngpt_kernels.cayley.dictionary import Levels
from sngpt_kernels.cayley.folding import DIGIT_BITS

WORD = 32  # points per thread


@dataclass(frozen=True)
class Config:
    """Block sizes. A program of the forward kernel has one warp."""

    forward_tokens: int  # per program, one after the other; they share its scratch memory
    bias_features: int  # per program of the kernel that adds up the bias gradient
    bias_lanes: int  # per feature of that kernel
    bias_warps: int

    @classmethod
    def heuristic(cls) -> "Config":
        """The sizes for any device and width."""
        return cls(forward_tokens=8, bias_features=4, bias_lanes=128, bias_warps=1)

    @classmethod
    def of(cls, dtype: jnp.dtype, levels: Levels) -> "Config":
        """The entry of the device's table, or `heuristic` if it has none."""
        entry = tuned_entry(dispatch.current_device(), dtype, levels)
        return cls(**entry["config"]) if "config" in entry else cls.heuristic()


def words(table_ref: Any, ids: Array, columns: Array) -> Array:
    """The words `columns` of the features `ids`, int32 of one shape, from a ref to `sign_words`."""
    digits = range(table_ref.shape[0])
    rows = [table_ref[c, (ids >> DIGIT_BITS * c) & (2**DIGIT_BITS - 1), columns] for c in digits]
    return functools.reduce(operator.xor, rows)


def flip(values: Array, sign_bits: Array) -> Array:
    """float32 values with flipped signs where `sign_bits`, of one shape, has its sign bit set."""
    flipped = lax.bitcast_convert_type(values, jnp.int32) ^ sign_bits
    return lax.bitcast_convert_type(flipped, jnp.float32)


def store_row(ref: Any, row: Array, mask: Array) -> Array:
    """`row` where `mask`, else a row beyond ref's last: the place of a masked store.

    Interpretation writes the old value back at masked places, so the store must not write them.
    """
    return jnp.where(mask, row, ref.shape[0])
