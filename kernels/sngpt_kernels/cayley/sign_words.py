"""Signs of atoms as bits of 32-bit words.

A few exclusive ors give the signs of 32 points. A population count per point would run at a
quarter of their rate.

A list of masks w_0 … w_(P-1), P a multiple of 32, is laid out as [32, P/32]: bit i of word j
belongs to position i·(P/32) + j. The bit is set if the sign of feature f is negative, which means
that popc(f & w) is odd. A parity is linear over exclusive or. So the words of f are the exclusive
or of the words of its five-bit digits, and each digit has a table of 32 rows.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# 32 rows per digit: the tables of all digits take 4 to 40 kB and stay in a GPU's L1 cache
DIGIT_BITS = 5


def sign_words(masks: np.ndarray, n: int) -> np.ndarray:
    """The tables of the features below 2^n at `masks` [P] int64: int32 [ceil(n/5), 32, P/32].

    Raises ValueError if P is no multiple of 32.
    """
    if masks.ndim != 1 or masks.size % 32:
        raise ValueError(f"masks is {list(masks.shape)}; expected one axis, a multiple of 32 long")
    digits = -(-n // DIGIT_BITS)
    features = np.arange(2**DIGIT_BITS) << DIGIT_BITS * np.arange(digits)[:, None]  # [digits, 32]
    odd = np.bitwise_count(features[..., None, None] & masks.reshape(32, -1)) & 1
    words = (odd.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(
        -2, dtype=np.uint32
    )
    return words.view(np.int32)


def words(table_ref: Any, ids: jax.Array, columns: jax.Array) -> jax.Array:
    """In a kernel: the words `columns` of the features `ids`, from a ref to `sign_words`.

    `ids` and `columns` are int32 of one shape.
    """
    digits = range(table_ref.shape[0])
    rows = [table_ref[c, (ids >> DIGIT_BITS * c) & (2**DIGIT_BITS - 1), columns] for c in digits]
    return functools.reduce(operator.xor, rows)


def sign_bits(words: jax.Array) -> jax.Array:
    """words [...] int32 → masks [32, ...] int32 for `flip`: bit i of the word as the sign bit."""
    shift = 31 - lax.broadcasted_iota(jnp.int32, (32, *words.shape), 0)
    return (words[None] << shift) & jnp.int32(-(2**31))


def flip(values: jax.Array, sign_bits: jax.Array) -> jax.Array:
    """float32 values with flipped signs where `sign_bits`, of one shape, has its sign bit set."""
    flipped = lax.bitcast_convert_type(values, jnp.int32) ^ sign_bits
    return lax.bitcast_convert_type(flipped, jnp.float32)
