"""Selection on chip: the k best of some candidates, inside a Pallas Triton kernel of one warp.

A bisection over float32 scores finds the threshold that k of them reach. A pass with many
candidates is sifted first: the k-th largest of its slots' maxima is a lower bound of the threshold,
few candidates reach the bound, and only these go on, through memory.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary

NEVER = -jnp.inf  # the score of a candidate that must not be chosen
LOWEST = -(2**31) + 2**23  # the order of the lowest finite score


class Tile(NamedTuple):
    """Candidates with the ids base ⊕ step. The scores are finite, +inf or NEVER."""

    scores: Array  # float32 [S]
    base: Array  # int32 [S]
    step: int


class Output(NamedTuple):
    """Where a kernel writes the code of one token, level by level."""

    row: Array
    saved_ref: Any  # [N, A] int32: the ids
    c_ref: Any  # [N, A] float32: y, at last c
    interpret: bool


class Work(NamedTuple):
    """Memory of a program for what its threads exchange."""

    row: Array
    ids_ref: Any  # [programs, L] int32: the candidates that the passes sifted out
    scores_ref: Any  # [programs, L] float32: their scores
    pairs_ref: Any  # [programs, pieces · d / 2] int32: x, as `pallas_encode` multiplies it
    groups_ref: Any  # [programs, K] int32: the groups of a level's parents
    words_ref: Any  # [programs, K · d / 32] int32: the signs of a level's parents
    interpret: bool


def add_up(terms: Sequence[Array]) -> Array:
    """The sum of arrays, from the left."""
    return functools.reduce(operator.add, terms)


def finite_or_infinite(y: Array, kept: Array | float) -> Array:
    """Scores: y, or +inf where y is not finite. `kept` is +inf, or NEVER to get NEVER."""
    return jnp.where(jnp.abs(y) < kept, y, kept)


def _order(y: Array) -> Array:
    """The int32 that order like the float32 y."""
    bits = lax.bitcast_convert_type(y, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _score(order: Array) -> Array:
    """The inverse of `_order`."""
    return lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)


def _count(masks: list[Array]) -> Array:
    return jnp.sum(add_up([mask.astype(jnp.int32) for mask in masks]))


def _threshold(scores: list[Array], k: int, most: int, least: Array | int) -> tuple[Array, Array]:
    """(t, n): n scores are at least t ≥ `least`, and k ≤ n ≤ `most`.

    Otherwise n > most. Then t is the k-th largest score, or `least` if fewer than k reach it.
    """
    top = jnp.max(functools.reduce(jnp.maximum, scores))

    def narrow(state: tuple[Array, ...], middle: Array) -> tuple[Array, ...]:
        low, high, reached = state  # k or more scores are at least low, fewer are at least high
        t = _score(middle)
        n = _count([y >= t for y in scores])
        return (
            jnp.where(n >= k, middle, low),
            jnp.where(n >= k, high, middle),
            jnp.where(n >= k, n, reached),
        )

    def searching(state: tuple[Array, ...]) -> Array:
        low, high, reached = state
        return (reached > most) & (low + 1 < high)

    def halve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, _ = state
        return narrow(state, (low & high) + ((low ^ high) >> 1))  # their mean, without overflow

    low, high = jnp.int32(least), jnp.maximum(_order(top), least) + 1
    # The threshold of a positive score is mostly more than half the largest score. That is a
    # difference of 2^23 in order.
    first = jnp.maximum(jnp.maximum(high, 0) - 2**23, low)
    if not isinstance(least, int):
        # Often too few scores reach a bound of the passes before, and then this is all.
        first = jnp.where(least > LOWEST, low, first)
    low, _, reached = lax.while_loop(searching, halve, narrow((low, high, jnp.int32(2**30)), first))
    return low, reached


def _mark(tiles: list[Tile], chosen: Callable[[Tile], Array]) -> Array:
    """int32 [S]: bit i is set where tile i is `chosen`."""
    return add_up([jnp.where(chosen(tile), 1 << i, 0) for i, tile in enumerate(tiles)])


def _mark_by_id(tiles: list[Tile], k: int, t: Array) -> Array:
    """`_mark` of the scores above t, and of those equal to t with the lowest ids up to k in all."""
    missing = k - _count([tile.scores > t for tile in tiles])

    def equal(tile: Tile, last: Array) -> Array:
        return (tile.scores == t) & ((tile.base ^ tile.step) <= last)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state  # fewer than `missing` have ids up to low, enough have ids up to high
        middle = (low + high) >> 1
        enough = _count([equal(tile, middle) for tile in tiles]) >= missing
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    ends = jnp.int32(-1), jnp.int32(2**dictionary.MAX_BITS)
    _, last = lax.while_loop(lambda state: state[0] + 1 < state[1], halve, ends)
    return _mark(tiles, lambda tile: (tile.scores > t) | equal(tile, last))


def _mark_best(tiles: list[Tile], k: int, least: Array | int) -> Array:
    """`_mark` of the k largest scores from `least` on, at most k. Of equal ones lower ids win."""
    order, reached = _threshold([tile.scores for tile in tiles], k, k, least)
    t = _score(order)
    return lax.cond(
        reached == k,
        lambda: _mark(tiles, lambda tile: tile.scores >= t),
        lambda: _mark_by_id(tiles, k, t),
    )


def _places(counts: Array) -> Array:
    """Places so that slot i has the counts[i] ones from places[i] on."""
    return jnp.cumsum(counts) - counts


def _store(
    ref_pair: tuple[Any, Any],
    row: Array,
    place: Array,
    mask: Array,
    ids: Array,
    y: Array,
    interpret: bool,
) -> None:
    # Interpretation stores the old value at masked places, so they are out of bounds.
    slot = jnp.where(mask, place, ref_pair[0].shape[1]) if interpret else place
    plgpu.store(ref_pair[0].at[row, slot], ids, mask=mask)
    plgpu.store(ref_pair[1].at[row, slot], y, mask=mask)


def select(tile: Tile, k: int, start: int, out: Output, least: Array | int) -> None:
    """Writes the ids and scores of the k largest scores to the places from `start` on.

    Of equal scores the lower id wins. k or more scores are at least `least`.
    """
    chosen = _mark_best([tile], k, least)
    refs = out.saved_ref, out.c_ref
    place = _places(chosen) + start
    ids = tile.base ^ tile.step
    _store(refs, out.row, place, chosen != 0, ids, tile.scores, out.interpret)


def capacity(k: int) -> int:
    """How many candidates a pass sifts out at most."""
    return max(32, 2 * 2 ** (k - 1).bit_length())


def sift(
    tiles: list[Tile], k: int, bound: Array | int, start: Array, work: Work
) -> tuple[Array, Array]:
    """Appends the candidates that can be among the k best to `work`, from `start` on.

    Returns the end, and a bound that k candidates of this pass or of the passes before reach. A
    round writes one candidate per slot, for all slots at once: few slots have more than two.
    """
    maxima = functools.reduce(jnp.maximum, [tile.scores for tile in tiles])
    bound, _ = _threshold([maxima], k, k + k // 8, bound)
    t = _score(bound)
    chosen = _mark(tiles, lambda tile: tile.scores >= t)
    few = jnp.sum(lax.population_count(chosen)) <= capacity(k)
    chosen = lax.cond(few, lambda: chosen, lambda: _mark_best(tiles, k, bound))
    counts = lax.population_count(chosen)
    place = _places(counts) + start
    refs = work.ids_ref, work.scores_ref

    def pick(lowest: Array, values: list[Any]) -> Any:
        """values[i] where bit i of `lowest` is the one that is set."""
        bit = 1
        while len(values) > 1:
            odd = sum(1 << i for i in range(len(tiles)) if i & bit)
            is_odd = (lowest & odd) != 0
            values = [
                jnp.where(is_odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)
            ]
            bit *= 2
        return values[0]

    def write(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chosen, place, rounds = state
        lowest = chosen & -chosen
        y = pick(lowest, [tile.scores for tile in tiles])
        # the steps of the tiles are the sums of some of them
        ids = tiles[0].base ^ tiles[0].step
        for bit in range(len(tiles).bit_length() - 1):
            odd = sum(1 << i for i in range(len(tiles)) if i >> bit & 1)
            ids = ids ^ jnp.where((lowest & odd) != 0, tiles[1 << bit].step ^ tiles[0].step, 0)
        _store(refs, work.row, place, chosen != 0, ids, y, work.interpret)
        return chosen ^ lowest, place + 1, rounds - 1

    lax.while_loop(lambda state: state[2] > 0, write, (chosen, place, jnp.max(counts)))
    return start + jnp.sum(counts), bound


def load(work: Work, size: int, stop: Array) -> Tile:
    """The first `stop` candidates of `work`, at most `size`."""
    # Declared as not contiguous, places lie in the threads as the stores of `select` need them.
    place = plgpu.max_contiguous(lax.iota(jnp.int32, 2 ** (size - 1).bit_length()), 1)
    ids, y = (
        plgpu.load(ref.at[work.row, place], mask=place < stop, other=other)
        for ref, other in ((work.ids_ref, 0), (work.scores_ref, NEVER))
    )
    return Tile(y, ids, 0)
