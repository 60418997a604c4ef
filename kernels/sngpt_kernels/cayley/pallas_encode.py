"""Scoring on chip: the device functions that make the code of one token in a Pallas Triton kernel.

Level 0 is a Walsh-Hadamard transform, two products with small matrices. Later levels score the
children of their parents as `folding` describes, in passes of 16 parents and 16 members per class.
All products are of ±1 and bfloat16, on the tensor cores. A float32 is split into three bfloat16
that add up to it exactly, so that only sums round. One warp encodes a token.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley.dictionary import Scheme
from sngpt_kernels.cayley.folding import Fold, fold
from sngpt_kernels.cayley.pallas_constants import MEMBERS, PARENTS, Level, grid, passes_of
from sngpt_kernels.cayley.pallas_decode import words
from sngpt_kernels.cayley.pallas_lookup import parts
from sngpt_kernels.cayley.pallas_select import (
    LOWEST,
    NEVER,
    Output,
    Tile,
    Work,
    add_up,
    capacity,
    finite_or_infinite,
    load,
    select,
    sift,
)
from sngpt_kernels.cayley.xla import ACTIVE_BIT

ROOT_ROWS = 32  # of level 0 at a time, so that they fit into registers


def barrier(interpret: bool) -> None:
    """Loads after it see the stores that other threads of this program made before it."""
    if not interpret:
        plgpu.debug_barrier()


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


def _joined(arrays: Sequence[Array]) -> Array:
    """[..., n] of n arrays [...], a power of two."""
    if len(arrays) == 1:
        return arrays[0][..., None]
    even, odd = _joined(arrays[::2]), _joined(arrays[1::2])
    return jnp.stack([even, odd], axis=-1).reshape(*arrays[0].shape, len(arrays))


def _by_four(count: int) -> Array:
    """0, 1, … below a power of two ≥ 4, int32 [count / 4, 4]: a thread loads 16 bytes.

    Triton gives all accesses of one shape the same layout. That of a list is another one, so the
    shape must not be that of a list.
    """
    return 4 * lax.iota(jnp.int32, count // 4)[:, None] + lax.iota(jnp.int32, 4)[None, :]


def _roots(
    row: Array, x_ref: Any, left_ref: Any, right_ref: Any, scale_ref: Any, offset_ref: Any
) -> list[Tile]:
    """The candidates of level 0: four tiles."""
    rows, columns = grid(x_ref.shape[-1])
    shape = left_ref.shape[0], right_ref.shape[0]
    height = min(shape[0], ROOT_ROWS)

    def points(slots: Array) -> tuple[Array, Array | None]:
        """The points of some of the matrix's places, and which ones exist; None means all."""
        if shape == (rows, columns):
            return slots, None
        i, j = slots // shape[1], slots % shape[1]
        return i * columns + j, (i < rows) & (j < columns)

    def load(ref: Any, slots: Array, *before: Array) -> Array:
        ids, exist = points(slots)
        other = None if exist is None else 0
        return plgpu.load(ref.at[(*before, ids)], mask=exist, other=other)

    sums = jnp.zeros(shape, jnp.float32)
    i, j = (lax.broadcasted_iota(jnp.int32, (height, shape[1]), axis) for axis in (0, 1))
    for top in range(0, shape[0], height):
        x = load(x_ref, (top + i) * shape[1] + j, row)
        left, right = left_ref[:, pl.ds(top, height)], right_ref[...]
        half = add_up([plgpu.dot(piece, right) for piece in _pieces(x)])
        for piece in _pieces(half):
            sums += plgpu.dot(left, piece)
    slots = _by_four(shape[0] * shape[1])
    _, exist = points(slots)
    kept = jnp.inf if exist is None else jnp.where(exist, jnp.inf, NEVER)
    y = sums.reshape(-1, 4) * load(scale_ref, slots) + load(offset_ref, slots)
    base, _ = points(4 * lax.iota(jnp.int32, shape[0] * shape[1] // 4))
    # The ids of four neighbours differ in the two lowest bits.
    scores = parts(finite_or_infinite(y, kept))
    return [Tile(of_step, base, step) for step, of_step in enumerate(scores)]


def _write_parents(out: Output, start: int, k: int, level: Level, work: Work) -> None:
    """Writes the groups of the k parents, and the words of their signs.

    The group of a parent that is not the first of its group is -1.
    """
    columns = level.words.shape[-1]

    def load(slots: Array) -> Array:
        ids = plgpu.load(out.saved_ref.at[out.row, start + slots], mask=slots < k, other=0)
        return plgpu.load(level.group_of_parent.at[ids], mask=slots < k, other=0)

    others = lax.iota(jnp.int32, 2 ** (k - 1).bit_length())
    of_others = load(others)
    for first in range(0, k, PARENTS):
        slots = first + lax.iota(jnp.int32, PARENTS)
        groups = load(slots)
        repeated = (groups[:, None] == of_others[None, :]) & (others[None, :] < slots[:, None])
        is_first = (jnp.sum(repeated.astype(jnp.int32), axis=1) == 0) & (slots < k)
        plgpu.store(work.groups_ref.at[work.row, slots], jnp.where(is_first, groups, -1))
        shape = (PARENTS, columns)
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        ids = jnp.broadcast_to(level.representatives[groups][:, None], shape)
        of_parents = words(level.words, ids, column)
        place = (first + lax.broadcasted_iota(jnp.int32, shape, 0)) * columns + column
        plgpu.store(work.words_ref.at[work.row, place], of_parents)


def _signed(of_parents: Array, pairs: Array) -> Array:
    """32 points with the signs of the parents, bfloat16 [PARENTS, 32].

    Two neighbours are the halves of an int32 of `pairs` [16]. Their signs are the bits j and j + 16
    of the parents' words.
    """
    shift = 15 - lax.broadcasted_iota(jnp.int32, (PARENTS, 16), 1)
    signs = (of_parents[:, None] << shift) & jnp.int32(-(2**31) + 2**15)
    both = signs ^ pairs[None, :]
    points = jnp.stack([both.astype(jnp.int16), (both >> 16).astype(jnp.int16)], axis=-1)
    return lax.bitcast_convert_type(points.reshape(PARENTS, 32), jnp.bfloat16)


def _write_pairs(row: Array, x_ref: Any, level: Level, work: Work) -> None:
    """Writes x in the order of the level's products, two points per int32."""
    half = x_ref.shape[-1] // 2
    q = _by_four(half)
    sides = []
    for side in range(2):
        x = plgpu.load(x_ref.at[row, level.points[side, q]])
        sides.append([lax.bitcast_convert_type(piece, jnp.int16) for piece in _pieces(x)])
    for number, (low, high) in enumerate(zip(*sides, strict=True)):
        pair = (low.astype(jnp.int32) & 0xFFFF) | (high.astype(jnp.int32) << 16)
        plgpu.store(work.pairs_ref.at[work.row, number * half + q], pair)


def _children(
    block: Array,
    chunk: Array,
    pieces: int,
    level: Level,
    scale_ref: Any,
    offset_ref: Any,
    folded: Fold,
    work: Work,
) -> list[Tile]:
    """The children of a block of parents' groups, of one chunk of members: a tile per class."""
    count = len(folded.class_steps)
    columns = level.words.shape[-1]
    shape = (PARENTS, MEMBERS)
    members = chunk * MEMBERS + lax.iota(jnp.int32, MEMBERS)

    def add_column(column: Array | int, total: Array) -> Array:
        """Adds 32 points."""
        matrix = level.matrix[column, members[:, None], lax.iota(jnp.int32, 32)[None, :]]
        matrix = matrix.reshape(MEMBERS, 4, 2, 4).transpose(0, 2, 1, 3).reshape(MEMBERS, 32).T
        place = (block * PARENTS + lax.iota(jnp.int32, PARENTS)) * columns + column
        of_parents = work.words_ref[work.row, place]
        for piece in range(pieces):
            place = (piece * columns + column) * 16 + lax.iota(jnp.int32, 16)
            pairs = work.pairs_ref[work.row, place]
            total += plgpu.dot(_signed(of_parents, pairs), matrix)
        return total

    def sum_class(index: int) -> Array:
        total = jnp.zeros(shape, jnp.float32)
        per_class = columns // count
        start = index * per_class
        return lax.fori_loop(start, start + per_class, add_column, total)

    sums = [sum_class(index) for index in range(count)]
    step = 1
    while step < count:  # a Walsh-Hadamard transform
        for i in range(count):
            if not i & step:
                a, b = sums[i], sums[i + step]
                sums[i], sums[i + step] = a + b, a - b
        step *= 2

    slots = lax.iota(jnp.int32, PARENTS * MEMBERS)
    member = chunk * MEMBERS + (slots & (MEMBERS - 1))
    groups = work.groups_ref[work.row, block * PARENTS + slots // MEMBERS]
    is_member = (member & (2**folded.new_bits - 1) != 0) & (member < folded.members)
    kept = jnp.where(is_member & (groups >= 0), jnp.inf, NEVER)
    groups = jnp.maximum(groups, 0)
    first = (groups * folded.member_steps.size + member) * count
    child = level.representatives[groups] ^ level.member_steps[member]
    tiles: list[Tile] = []
    size = min(4, count)  # A thread loads 16 bytes.
    for start in range(0, count, size):
        place = first[:, None] + (start + lax.iota(jnp.int32, size))[None, :]
        of_classes = _joined([total.reshape(-1) for total in sums[start : start + size]])
        y = of_classes * scale_ref[place] + offset_ref[place]
        tiles += [
            Tile(finite_or_infinite(scores, kept), child, folded.class_steps[start + i])
            for i, scores in enumerate(parts(y))
        ]
    return tiles


def _finish(out: Output, active: int, unstandardize: tuple[Any, ...]) -> None:
    """Turns y into c, and sets the bit of c > 0 in the ids."""
    slots = _by_four(max(4, 2 ** (active - 1).bit_length()))
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


def _encode_level(
    out: Output,
    work: Work,
    x_ref: Any,
    level: Level,
    tables: tuple[Any, ...],
    scheme: Scheme,
    index: int,
    start: int,
) -> None:
    """Writes the ids and scores of a level ≥ 1 to the places from `start` on."""
    (_, parents, _), (_, k, _) = scheme.levels[index - 1 : index + 1]
    folded = fold(scheme.levels, scheme.generators, index)
    chunks = folded.member_steps.size // MEMBERS
    pieces = 1 if x_ref.dtype == jnp.bfloat16 else 3
    scale_ref, offset_ref = tables
    _write_pairs(out.row, x_ref, level, work)
    _write_parents(out, start - parents, parents, level, work)
    barrier(out.interpret)

    def take(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        stop, bound = state
        block, chunk = number >> (chunks.bit_length() - 1), number & (chunks - 1)
        tiles = _children(block, chunk, pieces, level, scale_ref, offset_ref, folded, work)
        return sift(tiles, k, bound, stop, work)

    passes = passes_of(scheme.levels, scheme.generators, index)
    state = jnp.int32(0), jnp.int32(LOWEST)
    stop, bound = lax.fori_loop(0, passes, take, state)
    barrier(out.interpret)
    select(load(work, passes * capacity(k), stop), k, start, out, bound)


def encode_token(
    out: Output,
    work: Work,
    x_ref: Any,
    constant_refs: tuple[Any, ...],
    table_refs: tuple[Any, ...],
    scheme: Scheme,
) -> None:
    """In a kernel: writes the ids, with the active bit where c > 0, and c of the token x_ref[row].

    c is +inf if a score is not finite. A barrier must follow.
    """
    levels, fields = scheme.levels, len(Level._fields)
    roots = _roots(out.row, x_ref, *constant_refs[:2], *table_refs[:2])
    k = levels[0][1]
    stop, bound = sift(roots, k, LOWEST, jnp.int32(0), work)
    barrier(out.interpret)
    select(load(work, capacity(k), stop), k, 0, out, bound)
    start = k
    for index in range(1, len(levels)):
        barrier(out.interpret)
        level = Level(*constant_refs[2 + fields * (index - 1) : 2 + fields * index])
        tables = table_refs[2 * index : 2 * index + 2]
        _encode_level(out, work, x_ref, level, tables, scheme, index, start)
        start += levels[index][1]
    barrier(out.interpret)
    _finish(out, scheme.active, table_refs[2 * len(levels) :])
