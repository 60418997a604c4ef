"""Scoring and selection on chip: the device functions that make the code of one token inside a Pallas Triton kernel.

Level 0 is a Walsh-Hadamard transform, two products with small matrices. The children of the parents of a later level are
scored as `folding` describes. All products are of ±1 and bfloat16 on the tensor cores; a float32 is split into three bfloat16 that add up to
it exactly, so that only sums round. Scores stay in registers. The k best are found by bisection on integer keys that order like
the scores, counting how many reach a threshold. What is chosen at one level goes through memory to the next: a kernel can
exchange values between threads at computed positions in no other way.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from kernels.cayley import dictionary
from kernels.cayley.dictionary import Generators, Levels
from kernels.cayley.folding import fold, hadamard
from kernels.cayley.reference import STD_FLOOR
from kernels.cayley.sign_words import words
from kernels.cayley.xla import ACTIVE_BIT, all_scores

NEVER = -(2**31)  # the key of what must not be chosen; below that of any number
INFINITY = 0x7F800000  # the key of +inf
EVERY_ID = 2**dictionary.MAX_BITS


class _Level(NamedTuple):
    """The constants of a level ≥ 1, see `folding.Fold` and `dictionary.Children`."""

    group_of_parent: np.ndarray
    representatives: np.ndarray
    member_steps: np.ndarray
    points: np.ndarray
    matrix: np.ndarray
    words: np.ndarray


def barrier(interpret: bool) -> None:
    """Stores of this program before it are seen by its loads after it. Interpretation has no threads, and no such primitive."""
    if not interpret:
        plgpu.debug_barrier()


def _grid(d: int) -> tuple[int, int]:
    """(rows, columns) of the matrix that d points are arranged as for the transform."""
    t = d.bit_length() - 1
    return 2 ** (t - t // 2), 2 ** (t // 2)


def constants(levels: Levels, generators: Generators, d: int) -> tuple[np.ndarray, ...]:
    """What `encode_token` reads as `constant_refs`: inputs of the kernel, the same for every token and layer."""
    result = [hadamard(n).astype(jnp.bfloat16) for n in _grid(d)]
    for level in range(1, len(levels)):
        table, folded = dictionary.children(levels, generators, level), fold(levels, generators, level)
        matrix = folded.matrix.astype(jnp.bfloat16)
        result += _Level(
            table.group_of_parent, table.representatives, folded.member_steps, folded.points, matrix, folded.words
        )
    return tuple(result)


def tables(
    mean: jax.Array, std: jax.Array, bias: jax.Array, levels: Levels, generators: Generators, forward_standardized: bool
) -> tuple[jax.Array, ...]:
    """What `encode_token` reads as `table_refs`, float32: scale and offset of each level, y = scale · sum + offset.

    [d] at level 0, then [groups, classes, members], so that the children of a parent lie together. Without
    `forward_standardized` also [F] the standard deviations and biases, which take a standardized score back.
    """
    d = mean.shape[-1]
    deviation = jnp.maximum(std, STD_FLOOR)
    scale = 1 / deviation / np.float32(np.sqrt(d))
    offset = bias - all_scores(mean, levels[-1][0]) / deviation
    offset = jnp.where(offset == 0, 0, offset)  # the keys of -0 and 0 differ: without -0 there, no sum makes one
    result = [scale[:d], offset[:d]]
    for level in range(1, len(levels)):
        folded = fold(levels, generators, level)
        steps = np.array(folded.class_steps, np.int32)[:, None] ^ folded.member_steps
        ids = dictionary.children(levels, generators, level).representatives[:, None, None] ^ steps
        result += [scale[ids], offset[ids]]
    return tuple(result) if forward_standardized else (*result, deviation, bias)


def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """bfloat16 numbers whose sum is x exactly: one, or three of a float32, its significand being cut into three."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    parts = []
    for _ in range(2):  # by its bits: a compiler may take a conversion there and back for nothing
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16)), jnp.float32)
        parts.append(high)
        x = x - high
    return tuple(part.astype(jnp.bfloat16) for part in (*parts, x))


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _keys(y: jax.Array, allowed: jax.Array) -> jax.Array:
    """int32 that order like y, which is no -0; what is not finite counts as +inf, and what is not allowed comes last."""
    bits = lax.bitcast_convert_type(y, jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = jnp.where(jnp.abs(y) < jnp.inf, keys, INFINITY)
    return jnp.where(allowed, keys, NEVER)


def _count(masks: list[jax.Array]) -> jax.Array:
    return jnp.sum(_sum([mask.astype(jnp.int32) for mask in masks]).reshape(-1))


def _threshold(keys: list[jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """(t, n): n keys are at least t. n is k, or t the k-th largest key and n > k."""
    top = jnp.max(functools.reduce(jnp.maximum, keys).reshape(-1))

    def searching(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, reached = state
        return (reached != k) & (low + 1 < high)

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, reached = state  # k or more keys are at least low, fewer are at least high
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        n = _count([key >= middle for key in keys])
        return jnp.where(n >= k, middle, low), jnp.where(n >= k, high, middle), jnp.where(n >= k, n, reached)

    low, _, reached = lax.while_loop(searching, halve, (jnp.int32(NEVER + 1), top + 1, jnp.int32(k + 1)))
    return low, reached


def _last_id(keys: list[jax.Array], ids: list[jax.Array], k: int, t: jax.Array, reached: jax.Array) -> jax.Array:
    """Of the keys equal to t those with ids up to this one complete the k; every one of them where `reached` is k."""
    missing = k - _count([key > t for key in keys])

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high = state  # fewer than missing have ids up to low, enough up to high
        middle = (low + high) >> 1
        enough = _count([(key == t) & (f <= middle) for key, f in zip(keys, ids, strict=True)]) >= missing
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    start = jnp.where(reached == k, jnp.int32(EVERY_ID - 1), jnp.int32(-1))
    return lax.while_loop(lambda state: state[0] + 1 < state[1], halve, (start, jnp.int32(EVERY_ID)))[1]


def _select(
    keys: list[jax.Array],
    ids: list[jax.Array],
    k: int,
    row: jax.Array,
    start: int,
    saved_ref: jax.Array,
    y_ref: jax.Array,
    interpret: bool,
) -> None:
    """Writes the ids and y of the k largest keys, equal ones by the lower id, to [row, start:start + k]."""
    t, reached = _threshold(keys, k)
    last = _last_id(keys, ids, k, t, reached)
    chosen = [(key > t) | ((key == t) & (f <= last)) for key, f in zip(keys, ids, strict=True)]
    counts = _sum([mask.astype(jnp.int32) for mask in chosen])
    position = (jnp.cumsum(counts.reshape(-1)) - counts.reshape(-1)).reshape(counts.shape) + start
    for key, f, mask in zip(keys, ids, chosen, strict=True):
        y = lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
        # Interpretation stores at masked positions what was there, in no order with the others: send them out of bounds.
        slot = jnp.where(mask, position, saved_ref.shape[1]) if interpret else position
        plgpu.store(saved_ref.at[row, slot], f, mask=mask)
        plgpu.store(y_ref.at[row, slot], y, mask=mask)
        position = position + mask.astype(jnp.int32)


def _roots(
    row: jax.Array, x_ref: jax.Array, left_ref: jax.Array, right_ref: jax.Array, scale_ref: jax.Array, offset_ref: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(keys, ids) of level 0, [rows, columns]."""
    d = x_ref.shape[-1]
    rows, columns = _grid(d)
    shape = (left_ref.shape[0], right_ref.shape[0])
    i, j = lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
    ids, inside = i * columns + j, (i < rows) & (j < columns)
    x = plgpu.load(x_ref.at[row, ids], mask=inside, other=0)
    left, right = left_ref[...], right_ref[...]
    half = _sum([plgpu.dot(part, right) for part in _parts(x)])
    sums = _sum([plgpu.dot(left, part) for part in _parts(half)])
    scale, offset = (plgpu.load(ref.at[ids], mask=inside, other=0) for ref in (scale_ref, offset_ref))
    return _keys(sums * scale + offset, inside), ids


def _parents(
    row: jax.Array, start: int, k: int, saved_ref: jax.Array, group_ref: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(groups, first): the groups of the k parents, padded to P, a power of two, and whether none before is in the same group."""
    size = max(16, 2 ** (k - 1).bit_length())
    slots = lax.iota(jnp.int32, size)
    ids = plgpu.load(saved_ref.at[row, start + slots], mask=slots < k, other=0)
    groups = plgpu.load(group_ref.at[ids], mask=slots < k, other=-1)
    square = (size, size)
    i, j = lax.broadcasted_iota(jnp.int32, square, 0), lax.broadcasted_iota(jnp.int32, square, 1)
    repeated = jnp.sum(((groups[:, None] == groups[None, :]) & (i < j)).astype(jnp.int32), axis=0)
    return jnp.maximum(groups, 0), (repeated == 0) & (slots < k)


def _class_sums(
    row: jax.Array, index: int, representatives: jax.Array, x_ref: jax.Array, level: _Level
) -> jax.Array:
    """Σ over the points of one class of x · sign of the parent · sign of the member: [M, P]."""
    points = level.points[index, :]
    columns, parents = points.shape[0] // 32, representatives.shape[0]
    shape = (columns, parents)
    column = index * columns + lax.broadcasted_iota(jnp.int32, shape, 0)
    ids = jnp.broadcast_to(representatives[None, :], shape)
    flat = words(level.words, ids, column).reshape(1, columns * parents)
    shift = 31 - lax.broadcasted_iota(jnp.int32, (32, columns * parents), 0)
    bits = ((flat << shift) & NEVER) | 0x3F800000  # of 1.0, with the sign
    signs = lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16).reshape(32 * columns, parents)
    matrix = level.matrix[index, :, :]
    return _sum([plgpu.dot(matrix * part[None, :], signs) for part in _parts(x_ref[row, points])])


def _children(
    row: jax.Array,
    groups: jax.Array,
    first: jax.Array,
    x_ref: jax.Array,
    level: _Level,
    scale_ref: jax.Array,
    offset_ref: jax.Array,
    class_steps: tuple[int, ...],
    members: int,
    new_bits: int,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """(keys, ids) of the children of the parents' groups: [M, P] for each class."""
    representatives = level.representatives[groups]
    sums = [_class_sums(row, index, representatives, x_ref, level) for index in range(len(class_steps))]
    stride = 1
    while stride < len(sums):  # the Walsh-Hadamard transform across the classes
        sums = [sums[i] + sums[i + stride] if i & stride == 0 else sums[i - stride] - sums[i] for i in range(len(sums))]
        stride *= 2
    shape = sums[0].shape
    member = lax.broadcasted_iota(jnp.int32, shape, 0)
    allowed = (member & (2**new_bits - 1) != 0) & (member < members) & first[None, :]
    group = jnp.broadcast_to(groups[None, :], shape)
    ids = representatives[None, :] ^ level.member_steps[...][:, None]
    keys = [
        _keys(total * scale_ref[group, j, member] + offset_ref[group, j, member], allowed) for j, total in enumerate(sums)
    ]
    return keys, [ids ^ step for step in class_steps]


def _finish(
    row: jax.Array, active: int, saved_ref: jax.Array, c_ref: jax.Array, unstandardize: tuple[jax.Array, ...]
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
    plgpu.store(saved_ref.at[row, slots], ids | (c > 0).astype(jnp.int32) << ACTIVE_BIT, mask=used)
    plgpu.store(c_ref.at[row, slots], c, mask=used)


def encode_token(
    row: jax.Array,
    x_ref: jax.Array,
    constant_refs: tuple[jax.Array, ...],
    table_refs: tuple[jax.Array, ...],
    saved_ref: jax.Array,
    c_ref: jax.Array,
    *,
    levels: Levels,
    generators: Generators,
    forward_standardized: bool,
    interpret: bool,
) -> None:
    """In a kernel: the code of x_ref[row], A = Σk entries level by level, in no order within a level.

    Args:
      row: which token, int32.
      x_ref: [N, d] bfloat16 or float32.
      constant_refs: of `constants`.
      table_refs: of `tables`.
      saved_ref: [N, A] int32: the ids, with bit 30 set where c > 0. Written at `row`, and read again: a barrier must follow.
      c_ref: [N, A] float32: the coefficients c ≥ 0; +inf where the score is not finite. The same holds.
    """
    count = len(levels)
    keys, ids = _roots(row, x_ref, *constant_refs[:2], *table_refs[:2])
    _select([keys], [ids], levels[0][1], row, 0, saved_ref, c_ref, interpret)
    start = 0
    for index in range(1, count):
        barrier(interpret)
        fields = len(_Level._fields)
        level = _Level(*constant_refs[2 + fields * (index - 1) : 2 + fields * index])
        folded = fold(levels, generators, index)
        groups, first = _parents(row, start, levels[index - 1][1], saved_ref, level.group_of_parent)
        start += levels[index - 1][1]
        children = _children(
            row, groups, first, x_ref, level, *table_refs[2 * index : 2 * index + 2],
            folded.class_steps, folded.members, folded.new_bits,
        )  # fmt: skip
        _select(*children, levels[index][1], row, start, saved_ref, c_ref, interpret)
    barrier(interpret)
    _finish(row, start + levels[-1][1], saved_ref, c_ref, table_refs[2 * count :])
