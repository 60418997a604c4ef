"""Scoring and selection on chip: the device functions that make the code of one token inside a
Pallas Triton kernel.

Level 0 is a Walsh-Hadamard transform, two products with small matrices. The children of the
parents of a later level are scored as `folding` describes. All products are of ±1 and bfloat16, on
the tensor cores; a float32 is split into three bfloat16 that add up to it exactly, so that only
sums round. Scores stay in registers. The k best are found by bisection on integer keys that order
like the scores, counting how many reach a threshold. What is chosen at one level goes through
memory to the next: a kernel can exchange values between threads at computed positions in no other
way.

Four warps encode a token. Tiles of scores are [16 parents, members], a shape that Triton shares
out to four warps without any of them doing the work of another.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.dictionary import Generators, Levels
from sngpt_kernels.cayley.folding import Fold, fold, hadamard
from sngpt_kernels.cayley.reference import STD_FLOOR
from sngpt_kernels.cayley.sign_words import words
from sngpt_kernels.cayley.xla import ACTIVE_BIT, all_scores
from sngpt_kernels.dispatch import CannotServe

NEVER = -(2**31)  # the key of what must not be chosen; below that of any number
INFINITY = 0x7F800000  # the key of +inf
PARENTS = 16  # of a block: the rows of a tensor core's tile
THREADS = 128  # of a program, four warps
MOST_TILES = 31  # of candidates: which of them are chosen is marked in an int32
MOST_HELD = 64  # candidates of a thread: with more its registers do not suffice


class _Level(NamedTuple):
    """The constants of a level ≥ 1, see `folding.Fold` and `dictionary.Children`, or the refs to
    them.
    """

    group_of_parent: Any
    representatives: Any
    member_steps: Any
    points: Any
    matrix: Any
    words: Any


def barrier(interpret: bool) -> None:
    """Stores of this program before it are seen by its loads after it. Interpretation has no
    threads, and no such primitive.
    """
    if not interpret:
        plgpu.debug_barrier()


def _grid(d: int) -> tuple[int, int]:
    """(rows, columns) of the matrix that d points are arranged as for the transform."""
    t = d.bit_length() - 1
    return 2 ** (t - t // 2), 2 ** (t // 2)


def _blocks(levels: Levels, level: int) -> range:
    """The blocks of the parents of `level`."""
    return range(-(-levels[level - 1][1] // PARENTS))


def check(levels: Levels, generators: Generators) -> None:
    """Raises CannotServe, with the reason, where the kernel is not made for such levels."""
    d = 2 ** levels[0][0]
    if not 64 <= d <= 2048:
        raise CannotServe(f"pallas_triton serves widths from 64 to 2048; x has {d}")
    for level in range(1, len(levels)):
        folded = fold(levels, generators, level)
        tiles = len(_blocks(levels, level)) * len(folded.class_steps)
        held = tiles * PARENTS * folded.member_steps.size // THREADS
        if tiles > MOST_TILES or held > MOST_HELD:
            parents, degree = levels[level - 1][1], levels[level][2]
            raise CannotServe(
                f"pallas_triton keeps candidates in registers; level {level} has {parents} x"
                f" {degree}, too many"
            )


def constants(levels: Levels, generators: Generators, d: int) -> tuple[np.ndarray, ...]:
    """What `encode_token` reads as `constant_refs`: inputs of the kernel, the same for every token
    and layer.

    Raises CannotServe as `check` does.
    """
    check(levels, generators)
    result = [hadamard(n).astype(jnp.bfloat16) for n in _grid(d)]
    for level in range(1, len(levels)):
        table, folded = (
            dictionary.children(levels, generators, level),
            fold(levels, generators, level),
        )
        matrix = folded.matrix.astype(jnp.bfloat16)
        result += _Level(
            table.group_of_parent,
            table.representatives,
            folded.member_steps,
            folded.points,
            matrix,
            folded.words,
        )
    return tuple(result)


def tables(
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: Levels,
    generators: Generators,
    forward_standardized: bool,
) -> tuple[jax.Array, ...]:
    """What `encode_token` reads as `table_refs`, float32: scale and offset of each level, y =
    scale · sum + offset.

    [d] at level 0, then [groups, classes, members], so that the children of a parent lie together.
    Without `forward_standardized` also [F] the standard deviations and biases, which take a
    standardized score back.
    """
    d = mean.shape[-1]
    deviation = jnp.maximum(std, STD_FLOOR)
    scale = 1 / deviation / np.float32(np.sqrt(d))
    offset = bias - all_scores(mean, levels[-1][0]) / deviation
    # the keys of -0 and 0 differ: without -0 there, no sum makes one
    offset = jnp.where(offset == 0, 0, offset)
    result = [scale[:d], offset[:d]]
    for level in range(1, len(levels)):
        folded = fold(levels, generators, level)
        steps = np.array(folded.class_steps, np.int32)[:, None] ^ folded.member_steps
        ids = dictionary.children(levels, generators, level).representatives[:, None, None] ^ steps
        result += [scale[ids], offset[ids]]
    return tuple(result) if forward_standardized else (*result, deviation, bias)


def _pieces(x: jax.Array) -> tuple[jax.Array, ...]:
    """bfloat16 numbers whose sum is x exactly: one, or three of a float32, its significand being
    cut into three.
    """
    if x.dtype == jnp.bfloat16:
        return (x,)
    pieces = []
    for _ in range(2):  # by its bits: a compiler may take a conversion there and back for nothing
        high = lax.bitcast_convert_type(
            lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16)), jnp.float32
        )
        pieces.append(high)
        x = x - high
    return tuple(piece.astype(jnp.bfloat16) for piece in (*pieces, x))


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _keys(y: jax.Array, kept: jax.Array) -> jax.Array:
    """int32 that order like y, which is no -0: what is not finite counts as +inf. NEVER where
    `kept` has no bits set.
    """
    bits = lax.bitcast_convert_type(y, jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = jnp.where(jnp.abs(y) < jnp.inf, keys, INFINITY)
    return (keys & kept) | (NEVER & ~kept)


def _all_bits(mask: jax.Array) -> jax.Array:
    """Every bit set where `mask`, none elsewhere. A mask that lives long is better off so than in
    the few predicates.
    """
    return jnp.where(mask, jnp.int32(-1), jnp.int32(0))


def _count(masks: list[jax.Array]) -> jax.Array:
    return jnp.sum(_sum([mask.astype(jnp.int32) for mask in masks]))


class _Tile(NamedTuple):
    """Candidates: one tile of keys, and what gives their ids, base ⊕ step. Tiles of few bases hold
    few registers.
    """

    keys: jax.Array  # int32 [S]
    base: jax.Array  # int32 [S]
    step: int


def _threshold(keys: list[jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """(t, n): n keys are at least t. n is k, or t the k-th largest key and n > k."""
    top = jnp.max(functools.reduce(jnp.maximum, keys))

    def narrow(state: tuple[jax.Array, ...], middle: jax.Array) -> tuple[jax.Array, ...]:
        low, high, reached = state  # k or more keys are at least low, fewer are at least high
        n = _count([key >= middle for key in keys])
        return (
            jnp.where(n >= k, middle, low),
            jnp.where(n >= k, high, middle),
            jnp.where(n >= k, n, reached),
        )

    def searching(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, reached = state
        return (reached != k) & (low + 1 < high)

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, _ = state
        return narrow(state, (low & high) + ((low ^ high) >> 1))  # their mean, without overflow

    # The threshold of a positive score is mostly more than half the largest: that is a difference
    # of 2^23 in keys.
    state = narrow((jnp.int32(NEVER + 1), top + 1, jnp.int32(k + 1)), jnp.maximum(top, 0) - 2**23)
    low, _, reached = lax.while_loop(searching, halve, state)
    return low, reached


def _mark(tiles: list[_Tile], chosen: Callable[[_Tile], jax.Array]) -> jax.Array:
    """int32 [S]: bit i where tile i is `chosen`."""
    return _sum([jnp.where(chosen(tile), 1 << i, 0) for i, tile in enumerate(tiles)])


def _mark_by_id(tiles: list[_Tile], k: int, t: jax.Array) -> jax.Array:
    """`_mark` of the keys above t and, of those equal to t, as many with the lowest ids as
    complete the k.
    """
    missing = k - _count([tile.keys > t for tile in tiles])

    def equal(tile: _Tile, last: jax.Array) -> jax.Array:
        return (tile.keys == t) & ((tile.base ^ tile.step) <= last)

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state  # fewer than missing have ids up to low, enough up to high
        middle = (low + high) >> 1
        enough = _count([equal(tile, middle) for tile in tiles]) >= missing
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    ends = jnp.int32(-1), jnp.int32(2**dictionary.MAX_BITS)
    _, last = lax.while_loop(lambda state: state[0] + 1 < state[1], halve, ends)
    return _mark(tiles, lambda tile: (tile.keys > t) | equal(tile, last))


def _select(
    tiles: list[_Tile],
    k: int,
    row: jax.Array,
    start: int,
    saved_ref: Any,
    y_ref: Any,
    interpret: bool,
) -> None:
    """Writes the ids and y of the k largest keys, equal ones by the lower id, to [row, start:start
    + k].

    Few places of the tiles, which have one shape, are chosen from more than one or two tiles:
    those of a place are written one after the other, in all places at once.
    """
    t, reached = _threshold([tile.keys for tile in tiles], k)
    chosen = lax.cond(
        reached == k,
        lambda: _mark(tiles, lambda tile: tile.keys >= t),
        lambda: _mark_by_id(tiles, k, t),
    )
    counts = lax.population_count(chosen)
    position = jnp.cumsum(counts) - counts + start

    def write(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        chosen, position, rounds = state
        lowest = chosen & -chosen
        key, base, step = (
            tiles[0].keys,
            tiles[0].base,
            jnp.full(chosen.shape, tiles[0].step, jnp.int32),
        )
        for i, tile in enumerate(tiles[1:], 1):
            this = lowest == 1 << i
            key, step = jnp.where(this, tile.keys, key), jnp.where(this, tile.step, step)
            base = (
                base
                if tile.base is tiles[i - 1].base
                else jnp.where(lowest >= 1 << i, tile.base, base)
            )
        y = lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
        mask = chosen != 0
        # Interpretation stores at masked positions what was there, in no order with the others:
        # send them out of bounds.
        slot = jnp.where(mask, position, saved_ref.shape[1]) if interpret else position
        plgpu.store(saved_ref.at[row, slot], base ^ step, mask=mask)
        plgpu.store(y_ref.at[row, slot], y, mask=mask)
        return chosen ^ lowest, position + 1, rounds - 1

    rounds = jnp.max(counts)
    lax.while_loop(lambda state: state[2] > 0, write, (chosen, position, rounds))


def _zero(row: jax.Array) -> jax.Array:
    """0, which the compiler cannot know to be the same for all rows.

    Added to an index it keeps the addresses of constants from being computed ahead of the loop
    over a program's tokens: there are so many that they would take most of the registers.
    """
    return row >> 31


def _slots(size: int) -> jax.Array:
    """0 … size - 1, said not to be contiguous: a thread then has the same slots of whatever is
    loaded there, or computed.

    Of contiguous slots a thread loads several neighbours at once, which are exchanged with other
    threads' afterwards.
    """
    return plgpu.max_contiguous(lax.iota(jnp.int32, size), 1)


def _roots(
    row: jax.Array, x_ref: Any, left_ref: Any, right_ref: Any, scale_ref: Any, offset_ref: Any
) -> _Tile:
    """Level 0."""
    d = x_ref.shape[-1]
    rows, columns = _grid(d)
    shape = (left_ref.shape[0], right_ref.shape[0])
    i, j = lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
    ids, inside = i * columns + j, (i < rows) & (j < columns)
    x = plgpu.load(x_ref.at[row, ids], mask=inside, other=0)
    left, right = left_ref[...], right_ref[...]
    half = _sum([plgpu.dot(piece, right) for piece in _pieces(x)])
    sums = _sum([plgpu.dot(left, piece) for piece in _pieces(half)])
    slots = _slots(shape[0] * shape[1])
    i, j = slots // shape[1], slots % shape[1]
    ids, inside = i * columns + j, (i < rows) & (j < columns)
    scale, offset = (
        plgpu.load(ref.at[ids + _zero(row)], mask=inside, other=0)
        for ref in (scale_ref, offset_ref)
    )
    return _Tile(_keys(sums.reshape(-1) * scale + offset, _all_bits(inside)), ids, 0)


def _parents(
    row: jax.Array, start: int, k: int, block: int, saved_ref: Any, group_ref: Any
) -> tuple[jax.Array, jax.Array]:
    """(groups, first) [PARENTS] of a block of the k parents: their groups, and whether none before
    is in the same group.
    """

    def load(slots: jax.Array) -> jax.Array:
        ids = plgpu.load(saved_ref.at[row, start + slots], mask=slots < k, other=0)
        return plgpu.load(group_ref.at[ids], mask=slots < k, other=0)

    slots, others = (
        block * PARENTS + lax.iota(jnp.int32, PARENTS),
        lax.iota(jnp.int32, 2 ** (k - 1).bit_length()),
    )
    groups = load(slots)
    repeated = (groups[:, None] == load(others)[None, :]) & (others[None, :] < slots[:, None])
    return groups, (jnp.sum(repeated.astype(jnp.int32), axis=1) == 0) & (slots < k)


def _parent_signs(level: _Level, index: jax.Array, representatives: jax.Array) -> jax.Array:
    """The signs of the parents at the points of one part of a class: bfloat16 [K, PARENTS]."""
    columns = level.points.shape[1] // 32
    shape = (columns, PARENTS)
    column = index * columns + lax.broadcasted_iota(jnp.int32, shape, 0)
    flat = words(level.words, jnp.broadcast_to(representatives[None, :], shape), column).reshape(
        1, columns * PARENTS
    )
    shift = 31 - lax.broadcasted_iota(jnp.int32, (32, columns * PARENTS), 0)
    bits = ((flat << shift) & NEVER) | 0x3F800000  # of 1.0, with the sign
    return (
        lax.bitcast_convert_type(bits, jnp.float32)
        .astype(jnp.bfloat16)
        .reshape(32 * columns, PARENTS)
    )


def _children(
    row: jax.Array,
    parents: list[tuple[jax.Array, jax.Array]],
    x_ref: Any,
    level: _Level,
    scale_ref: Any,
    offset_ref: Any,
    folded: Fold,
) -> list[_Tile]:
    """The children of the parents' groups: a tile of PARENTS · M for each block of parents and
    class.
    """
    classes = range(len(folded.class_steps))
    representatives = [level.representatives[groups] for groups, _ in parents]
    parts = level.points.shape[0] // len(classes)  # of a class

    def add_part(part: jax.Array, sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
        """Adds what a part of a class says of the points' sums to Σ_class (-1)^<i, class> · sum,
        for each block and i.
        """
        matrix, x = level.matrix[part, :, :], x_ref[row, level.points[part, :]]
        signed = [(matrix * piece[None, :]).T for piece in _pieces(x)]
        sign = [
            1 - 2 * (lax.population_count(part // parts & i) & 1).astype(jnp.float32)
            for i in classes
        ]
        totals = []
        for f in representatives:
            signs = _parent_signs(level, part, f).T
            totals.append(_sum([plgpu.dot(signs, piece) for piece in signed]))
        return [
            [before[i] + sign[i] * total for i in classes]
            for before, total in zip(sums, totals, strict=True)
        ]

    # A loop, though every class could stand in the program: straight on it would be longer than
    # the instruction cache.
    nothing = [[jnp.zeros((PARENTS, folded.member_steps.size), jnp.float32)] * len(classes)] * len(
        parents
    )
    sums = lax.fori_loop(0, level.points.shape[0], add_part, nothing)
    tiles = []
    for (groups, first), f, totals in zip(parents, representatives, sums, strict=True):
        shape = totals[0].shape
        member = _slots(shape[0] * shape[1]) & (shape[1] - 1)

        def spread(values: jax.Array, shape: tuple[int, ...] = shape) -> jax.Array:
            return jnp.broadcast_to(values[:, None], shape).reshape(-1)

        kept = _all_bits(
            (member & (2**folded.new_bits - 1) != 0) & (member < folded.members)
        ) & spread(_all_bits(first))
        group, child = spread(groups), spread(f) ^ level.member_steps[member + _zero(row)]
        for i, total in enumerate(totals):
            y = total.reshape(-1) * scale_ref[group, i, member] + offset_ref[group, i, member]
            tiles.append(_Tile(_keys(y, kept), child, folded.class_steps[i]))
    return tiles


def _finish(
    row: jax.Array,
    active: int,
    saved_ref: Any,
    c_ref: Any,
    unstandardize: tuple[Any, ...],
    interpret: bool,
) -> None:
    """y to c and ids to ids with the bit of c > 0, in [row, :active]."""
    slots = lax.iota(jnp.int32, 2 ** (active - 1).bit_length())
    used = slots < active
    ids = plgpu.load(saved_ref.at[row, slots], mask=used, other=0)
    c = plgpu.load(c_ref.at[row, slots], mask=used, other=0)
    if unstandardize:
        deviation, bias = (plgpu.load(ref.at[ids], mask=used, other=0) for ref in unstandardize)
        raw = (c - bias) * deviation + bias
        c = jnp.where((jnp.abs(raw) < jnp.inf) & (c < jnp.inf), raw, jnp.inf)
    c = jnp.maximum(c, 0)
    # where there are fewer slots than threads, several load what one of them stores
    barrier(interpret)
    plgpu.store(saved_ref.at[row, slots], ids | (c > 0).astype(jnp.int32) << ACTIVE_BIT, mask=used)
    plgpu.store(c_ref.at[row, slots], c, mask=used)


def encode_token(
    row: jax.Array,
    x_ref: Any,
    constant_refs: tuple[Any, ...],
    table_refs: tuple[Any, ...],
    saved_ref: Any,
    c_ref: Any,
    *,
    levels: Levels,
    generators: Generators,
    forward_standardized: bool,
    interpret: bool,
) -> None:
    """In a kernel: the code of x_ref[row], A = Σk entries level by level, in no order within a
    level.

    Args:
      row: which token, int32.
      x_ref: [N, d] bfloat16 or float32.
      constant_refs: of `constants`.
      table_refs: of `tables`.
      saved_ref: [N, A] int32: the ids, with bit 30 set where c > 0. Written at `row`, and read again: a barrier must follow.
      c_ref: [N, A] float32: the coefficients c ≥ 0; +inf where the score is not finite. The same holds.
    """
    count = len(levels)
    roots = _roots(row, x_ref, *constant_refs[:2], *table_refs[:2])
    _select([roots], levels[0][1], row, 0, saved_ref, c_ref, interpret)
    start = 0
    for index in range(1, count):
        barrier(interpret)
        fields = len(_Level._fields)
        level = _Level(*constant_refs[2 + fields * (index - 1) : 2 + fields * index])
        k = levels[index - 1][1]
        parents = [
            _parents(row, start, k, block, saved_ref, level.group_of_parent)
            for block in _blocks(levels, index)
        ]
        start += k
        scale_ref, offset_ref = table_refs[2 * index : 2 * index + 2]
        children = _children(
            row, parents, x_ref, level, scale_ref, offset_ref, fold(levels, generators, index)
        )
        _select(children, levels[index][1], row, start, saved_ref, c_ref, interpret)
    barrier(interpret)
    _finish(row, start + levels[-1][1], saved_ref, c_ref, table_refs[2 * count :], interpret)
