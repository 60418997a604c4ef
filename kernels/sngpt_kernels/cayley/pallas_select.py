"""Selection on chip: the k best of some tiles of candidates, inside a Pallas Triton kernel.

A bisection finds the threshold that k integer keys reach. The keys order like the scores.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary

NEVER = -(2**31)  # the key of a candidate that must not be chosen; below the key of any number
INFINITY = 0x7F800000  # the key of +inf


class Tile(NamedTuple):
    """Candidates with the ids base ⊕ step. Tiles that share bases save registers."""

    keys: Array  # int32 [S]
    base: Array  # int32 [S]
    step: int


class Output(NamedTuple):
    """Where a kernel writes the code of one token, level by level."""

    row: Array
    saved_ref: Any  # [N, A] int32: the ids
    c_ref: Any  # [N, A] float32: y, at last c
    interpret: bool


def add_up(terms: Sequence[Array]) -> Array:
    """The sum of arrays, from the left."""
    return functools.reduce(operator.add, terms)


def _ordered(bits: Array) -> Array:
    """The bits of a float32 as an integer that orders like it, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def keys_of(y: Array, kept: Array) -> Array:
    """int32 keys that order like y, which is never -0. A y that is not finite counts as +inf.

    The key is NEVER where `kept` has no bits set.
    """
    keys = _ordered(lax.bitcast_convert_type(y, jnp.int32))
    keys = jnp.where(jnp.abs(y) < jnp.inf, keys, INFINITY)
    return (keys & kept) | (NEVER & ~kept)


def all_bits(mask: Array) -> Array:
    """int32 with every bit set where `mask`, else 0: long-lived masks would use up predicates."""
    return jnp.where(mask, jnp.int32(-1), jnp.int32(0))


def _count(masks: list[Array]) -> Array:
    return jnp.sum(add_up([mask.astype(jnp.int32) for mask in masks]))


def _threshold(keys: list[Array], k: int) -> tuple[Array, Array]:
    """(t, n): n keys are at least t. Either n = k, or n > k and t is the k-th largest key."""
    top = jnp.max(functools.reduce(jnp.maximum, keys))

    def narrow(state: tuple[Array, ...], middle: Array) -> tuple[Array, ...]:
        low, high, reached = state  # k or more keys are at least low, fewer are at least high
        n = _count([key >= middle for key in keys])
        return (
            jnp.where(n >= k, middle, low),
            jnp.where(n >= k, high, middle),
            jnp.where(n >= k, n, reached),
        )

    def searching(state: tuple[Array, ...]) -> Array:
        low, high, reached = state
        return (reached != k) & (low + 1 < high)

    def halve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, _ = state
        return narrow(state, (low & high) + ((low ^ high) >> 1))  # their mean, without overflow

    # The threshold of a positive score is mostly more than half the largest score. That is a
    # difference of 2^23 in keys.
    state = narrow((jnp.int32(NEVER + 1), top + 1, jnp.int32(k + 1)), jnp.maximum(top, 0) - 2**23)
    low, _, reached = lax.while_loop(searching, halve, state)
    return low, reached


def _mark(tiles: list[Tile], chosen: Callable[[Tile], Array]) -> Array:
    """int32 [S]: bit i is set where tile i is `chosen`."""
    return add_up([jnp.where(chosen(tile), 1 << i, 0) for i, tile in enumerate(tiles)])


def _mark_by_id(tiles: list[Tile], k: int, t: Array) -> Array:
    """`_mark` of the keys above t, and of keys equal to t with the lowest ids up to k in all."""
    missing = k - _count([tile.keys > t for tile in tiles])

    def equal(tile: Tile, last: Array) -> Array:
        return (tile.keys == t) & ((tile.base ^ tile.step) <= last)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state  # fewer than `missing` have ids up to low, enough have ids up to high
        middle = (low + high) >> 1
        enough = _count([equal(tile, middle) for tile in tiles]) >= missing
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    ends = jnp.int32(-1), jnp.int32(2**dictionary.MAX_BITS)
    _, last = lax.while_loop(lambda state: state[0] + 1 < state[1], halve, ends)
    return _mark(tiles, lambda tile: (tile.keys > t) | equal(tile, last))


def select(tiles: list[Tile], k: int, start: int, out: Output) -> None:
    """Writes the ids and y of the k largest keys to the places from `start` on.

    Of equal keys the lower id wins. Few places are chosen in more than one or two tiles. So each
    round writes one candidate per place, for all places at once.
    """
    t, reached = _threshold([tile.keys for tile in tiles], k)
    chosen = lax.cond(
        reached == k,
        lambda: _mark(tiles, lambda tile: tile.keys >= t),
        lambda: _mark_by_id(tiles, k, t),
    )
    counts = lax.population_count(chosen)
    position = jnp.cumsum(counts) - counts + start

    def write(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chosen, position, rounds = state
        lowest = chosen & -chosen
        key, base = tiles[0].keys, tiles[0].base
        step = jnp.full(chosen.shape, tiles[0].step, jnp.int32)
        for i, tile in enumerate(tiles[1:], 1):
            this = lowest == 1 << i
            key, step = jnp.where(this, tile.keys, key), jnp.where(this, tile.step, step)
            if tile.base is not tiles[i - 1].base:
                base = jnp.where(lowest >= 1 << i, tile.base, base)
        y = lax.bitcast_convert_type(_ordered(key), jnp.float32)
        mask = chosen != 0
        # Interpretation stores the old value at masked positions, so they are out of bounds.
        slot = jnp.where(mask, position, out.c_ref.shape[1]) if out.interpret else position
        plgpu.store(out.saved_ref.at[out.row, slot], base ^ step, mask=mask)
        plgpu.store(out.c_ref.at[out.row, slot], y, mask=mask)
        return chosen ^ lowest, position + 1, rounds - 1

    lax.while_loop(lambda state: state[2] > 0, write, (chosen, position, jnp.max(counts)))
