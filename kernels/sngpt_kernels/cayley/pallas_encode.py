"""Scoring on chip: the device functions that make the code of one token in a Pallas Triton kernel.

Level 0 is a Walsh-Hadamard transform, two products with small matrices. Later levels score the
children of their parents as `folding` describes. All products are of ±1 and bfloat16, on the
tensor cores. A float32 is split into three bfloat16 that add up to it exactly, so that only sums
round. Four warps encode a token and share tiles of scores [16 parents, members].
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley.dictionary import STD_FLOOR, Generators, Levels, Scheme, hadamard
from sngpt_kernels.cayley.folding import Fold, fold
from sngpt_kernels.cayley.pallas_decode import THREADS, words
from sngpt_kernels.cayley.pallas_select import (
    NEVER,
    Output,
    Tile,
    add_up,
    all_bits,
    keys_of,
    select,
)
from sngpt_kernels.cayley.xla import ACTIVE_BIT, all_scores
from sngpt_kernels.dispatch import CannotServe

PARENTS = 16  # per block: the rows of a tensor core's tile
MOST_TILES = 31  # of candidates; an int32 marks which tiles are chosen
MOST_HELD = 64  # candidates per thread; more do not fit into its registers


class _Level(NamedTuple):
    """The constants of a level ≥ 1, or refs to them; see `Fold` and `dictionary.Children`."""

    group_of_parent: Any
    representatives: Any
    member_steps: Any
    points: Any
    matrix: Any
    words: Any


def barrier(interpret: bool) -> None:
    """Loads after it see the stores that other threads of this program made before it."""
    if not interpret:
        plgpu.debug_barrier()


def _grid(d: int) -> tuple[int, int]:
    """(rows, columns) of the matrix of d points that is transformed."""
    t = d.bit_length() - 1
    return 2 ** (t - t // 2), 2 ** (t // 2)


def _parent_blocks(levels: Levels, level: int) -> range:
    return range(-(-levels[level - 1][1] // PARENTS))


def check(levels: Levels, generators: Generators) -> None:
    """Raises CannotServe, with the reason, if the kernel is not made for such levels."""
    d = 2 ** levels[0][0]
    if not 64 <= d <= 2048:
        raise CannotServe(f"pallas_triton serves widths from 64 to 2048; x has {d}")
    for level in range(1, len(levels)):
        folded = fold(levels, generators, level)
        tiles = len(_parent_blocks(levels, level)) * len(folded.class_steps)
        held = tiles * PARENTS * folded.member_steps.size // THREADS
        if tiles > MOST_TILES or held > MOST_HELD:
            has = f"level {level} has {levels[level - 1][1]} x {levels[level][2]}"
            raise CannotServe(f"pallas_triton keeps candidates in registers; {has}, too many")


def constants(scheme: Scheme) -> tuple[np.ndarray, ...]:
    """The `constant_refs` of `encode_token`: kernel inputs that no token or layer changes."""
    padded = [np.pad(hadamard(n), (0, max(16 - n, 0))) for n in _grid(scheme.width)]
    result = [matrix.astype(jnp.bfloat16) for matrix in padded]
    for level in range(1, len(scheme.levels)):
        table, folded = scheme.children(level), fold(scheme.levels, scheme.generators, level)
        result += _Level(
            table.group_of_parent,
            table.representatives,
            folded.member_steps,
            folded.points,
            folded.matrix.astype(jnp.bfloat16),
            folded.words,
        )
    return tuple(result)


def tables(mean: Array, std: Array, bias: Array, scheme: Scheme) -> tuple[Array, ...]:
    """The `table_refs` of `encode_token`, float32: scale and offset of y = scale · sum + offset.

    They are [d] at level 0, then [groups, classes, members], so that the children of a parent lie
    together. Without `forward_standardized` the deviations and biases [F] follow.
    """
    deviation = jnp.maximum(std, STD_FLOOR)
    scale = 1 / deviation / np.float32(np.sqrt(scheme.width))
    offset = bias - all_scores(mean, scheme.levels[-1][0]) / deviation
    # The keys of -0 and 0 differ. Without a -0 in the offsets no sum makes one.
    offset = jnp.where(offset == 0, 0, offset)
    result = [scale[: scheme.width], offset[: scheme.width]]
    for level in range(1, len(scheme.levels)):
        folded = fold(scheme.levels, scheme.generators, level)
        steps = np.array(folded.class_steps, np.int32)[:, None] ^ folded.member_steps
        ids = scheme.children(level).representatives[:, None, None] ^ steps
        result += [scale[ids], offset[ids]]
    return tuple(result) if scheme.forward_standardized else (*result, deviation, bias)


def _pieces(x: Array) -> list[Array]:
    """bfloat16 numbers whose sum is x exactly: x itself, or three parts of a float32."""
    if x.dtype == jnp.bfloat16:
        return [x]
    pieces = []
    # The bits are cut off by a mask. A compiler may drop a conversion to bfloat16 and back.
    for _ in range(2):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        pieces.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - pieces[-1]
    return [piece.astype(jnp.bfloat16) for piece in (*pieces, x)]


def _zero(row: Array) -> Array:
    """0, unknown to the compiler, so that it computes no addresses ahead of the tokens."""
    return row >> 31


def _slots(size: int) -> Array:
    """0 … size - 1, declared as not contiguous: a thread then has the same slots everywhere."""
    return plgpu.max_contiguous(lax.iota(jnp.int32, size), 1)


def _roots(
    row: Array, x_ref: Any, left_ref: Any, right_ref: Any, scale_ref: Any, offset_ref: Any
) -> Tile:
    """The candidates of level 0."""
    rows, columns = _grid(x_ref.shape[-1])
    shape = (left_ref.shape[0], right_ref.shape[0])

    def points(i: Array, j: Array) -> tuple[Array, Array]:
        return i * columns + j, (i < rows) & (j < columns)

    ids, inside = points(*(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1)))
    x = plgpu.load(x_ref.at[row, ids], mask=inside, other=0)
    left, right = left_ref[...], right_ref[...]
    half = add_up([plgpu.dot(piece, right) for piece in _pieces(x)])
    sums = add_up([plgpu.dot(left, piece) for piece in _pieces(half)])
    slots = _slots(shape[0] * shape[1])
    ids, inside = points(slots // shape[1], slots % shape[1])
    scale, offset = (
        plgpu.load(ref.at[ids + _zero(row)], mask=inside, other=0)
        for ref in (scale_ref, offset_ref)
    )
    return Tile(keys_of(sums.reshape(-1) * scale + offset, all_bits(inside)), ids, 0)


def _parents(out: Output, start: int, k: int, block: int, group_ref: Any) -> tuple[Array, Array]:
    """The groups of a block of the k parents, and which parents are the first of their group."""

    def load(slots: Array) -> Array:
        ids = plgpu.load(out.saved_ref.at[out.row, start + slots], mask=slots < k, other=0)
        return plgpu.load(group_ref.at[ids], mask=slots < k, other=0)

    slots = block * PARENTS + lax.iota(jnp.int32, PARENTS)
    others = lax.iota(jnp.int32, 2 ** (k - 1).bit_length())
    groups = load(slots)
    repeated = (groups[:, None] == load(others)[None, :]) & (others[None, :] < slots[:, None])
    return groups, (jnp.sum(repeated.astype(jnp.int32), axis=1) == 0) & (slots < k)


def _parent_signs(level: _Level, index: Array, representatives: Array) -> Array:
    """The signs of the parents at the points of one part of a class: bfloat16 [K, PARENTS]."""
    columns = level.points.shape[1] // 32
    shape = (columns, PARENTS)
    column = index * columns + lax.broadcasted_iota(jnp.int32, shape, 0)
    of_parents = words(level.words, jnp.broadcast_to(representatives[None, :], shape), column)
    flat = of_parents.reshape(1, columns * PARENTS)
    shift = 31 - lax.broadcasted_iota(jnp.int32, (32, columns * PARENTS), 0)
    bits = ((flat << shift) & NEVER) | 0x3F800000  # the sign, and the bits of 1.0
    signs = lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
    return signs.reshape(32 * columns, PARENTS)


def _children(
    row: Array,
    parents: list[tuple[Array, Array]],
    x_ref: Any,
    level: _Level,
    scale_ref: Any,
    offset_ref: Any,
    folded: Fold,
) -> list[Tile]:
    """The children of the parents' groups: a tile of PARENTS · M per block of parents and class."""
    classes = range(len(folded.class_steps))
    representatives = [level.representatives[groups] for groups, _ in parents]
    parts = level.points.shape[0] // len(classes)  # per class

    def add_part(part: Array, sums: list[list[Array]]) -> list[list[Array]]:
        """Adds a part of a class to Σ_class (-1)^<i, class> · S(class), per block and i."""
        matrix, x = level.matrix[part, :, :], x_ref[row, level.points[part, :]]
        signed = [(matrix * piece[None, :]).T for piece in _pieces(x)]
        sign = [
            1 - 2 * (lax.population_count(part // parts & i) & 1).astype(jnp.float32)
            for i in classes
        ]
        totals = []
        for f in representatives:
            signs = _parent_signs(level, part, f).T
            totals.append(add_up([plgpu.dot(signs, piece) for piece in signed]))
        return [
            [before[i] + sign[i] * total for i in classes]
            for before, total in zip(sums, totals, strict=True)
        ]

    # Unrolled over all parts, the program would exceed the instruction cache.
    zeros = jnp.zeros((PARENTS, folded.member_steps.size), jnp.float32)
    nothing = [[zeros] * len(classes)] * len(parents)
    sums = lax.fori_loop(0, level.points.shape[0], add_part, nothing)

    def spread(values: Array) -> Array:
        return jnp.broadcast_to(values[:, None], zeros.shape).reshape(-1)

    tiles = []
    for (groups, first), f, totals in zip(parents, representatives, sums, strict=True):
        member = _slots(zeros.size) & (zeros.shape[1] - 1)
        is_member = (member & (2**folded.new_bits - 1) != 0) & (member < folded.members)
        kept = all_bits(is_member) & spread(all_bits(first))
        group, child = spread(groups), spread(f) ^ level.member_steps[member + _zero(row)]
        for i, total in enumerate(totals):
            y = total.reshape(-1) * scale_ref[group, i, member] + offset_ref[group, i, member]
            tiles.append(Tile(keys_of(y, kept), child, folded.class_steps[i]))
    return tiles


def _finish(out: Output, active: int, unstandardize: tuple[Any, ...]) -> None:
    """Turns y into c, and sets the bit of c > 0 in the ids."""
    slots = lax.iota(jnp.int32, 2 ** (active - 1).bit_length())
    used = slots < active
    ids, c = (
        plgpu.load(ref.at[out.row, slots], mask=used, other=0) for ref in (out.saved_ref, out.c_ref)
    )
    if unstandardize:
        deviation, bias = (plgpu.load(ref.at[ids], mask=used, other=0) for ref in unstandardize)
        raw = (c - bias) * deviation + bias
        c = jnp.where((jnp.abs(raw) < jnp.inf) & (c < jnp.inf), raw, jnp.inf)
    c = jnp.maximum(c, 0)
    # If there are fewer slots than threads, several threads load what one of them stores.
    barrier(out.interpret)
    saved = out.saved_ref.at[out.row, slots]
    plgpu.store(saved, ids | (c > 0).astype(jnp.int32) << ACTIVE_BIT, mask=used)
    plgpu.store(out.c_ref.at[out.row, slots], c, mask=used)


def encode_token(
    out: Output,
    x_ref: Any,
    constant_refs: tuple[Any, ...],
    table_refs: tuple[Any, ...],
    scheme: Scheme,
) -> None:
    """In a kernel: writes the ids, with the active bit where c > 0, and c of the token x_ref[row].

    c is +inf if a score is not finite. A barrier must follow.
    """
    levels, fields = scheme.levels, len(_Level._fields)
    roots = _roots(out.row, x_ref, *constant_refs[:2], *table_refs[:2])
    select([roots], levels[0][1], 0, out)
    start = 0
    for index in range(1, len(levels)):
        barrier(out.interpret)
        level = _Level(*constant_refs[2 + fields * (index - 1) : 2 + fields * index])
        k = levels[index - 1][1]
        parents = [
            _parents(out, start, k, block, level.group_of_parent)
            for block in _parent_blocks(levels, index)
        ]
        start += k
        folded = fold(levels, scheme.generators, index)
        scale_ref, offset_ref = table_refs[2 * index : 2 * index + 2]
        children = _children(out.row, parents, x_ref, level, scale_ref, offset_ref, folded)
        select(children, levels[index][1], start, out)
    barrier(out.interpret)
    _finish(out, scheme.active, table_refs[2 * len(levels) :])
