"""What the forward kernel is given beside a token: constants, made on the host, and tables.

The constants depend on the scheme alone, and the tables on the statistics and the biases.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sngpt_kernels.cayley.dictionary import STD_FLOOR, Generators, Levels, Scheme, hadamard
from sngpt_kernels.cayley.folding import Fold, fold
from sngpt_kernels.cayley.pallas_select import capacity
from sngpt_kernels.cayley.xla import all_scores
from sngpt_kernels.dispatch import CannotServe

PARENTS = 16  # per block: the rows of a tensor core's tile
MEMBERS = 16  # per pass
MOST_CANDIDATES = 2**13  # per token and level; more would take more than 16 passes


class Level(NamedTuple):
    """The constants of a level ≥ 1, or refs to them; see `Fold` and `dictionary.Children`."""

    group_of_parent: Any
    representatives: Any
    member_steps: Any
    points: Any
    matrix: Any
    words: Any


def grid(d: int) -> tuple[int, int]:
    """(rows, columns) of the matrix of d points that is transformed."""
    t = d.bit_length() - 1
    return 2 ** (t - t // 2), 2 ** (t // 2)


def _parent_blocks(levels: Levels, level: int) -> range:
    return range(-(-levels[level - 1][1] // PARENTS))


def passes_of(levels: Levels, generators: Generators, level: int) -> int:
    """Blocks of parents times chunks of members, of level ≥ 1."""
    chunks = fold(levels, generators, level).member_steps.size // MEMBERS
    return len(_parent_blocks(levels, level)) * chunks


def most_parents(levels: Levels) -> int:
    """The most parents of a level, in whole blocks."""
    blocks = [len(_parent_blocks(levels, level)) for level in range(1, len(levels))]
    return PARENTS * max(blocks, default=1)


def list_size(levels: Levels, generators: Generators) -> int:
    """The most candidates that the passes of a level sift out."""
    passes = [1, *(passes_of(levels, generators, level) for level in range(1, len(levels)))]
    return max(n * capacity(k) for n, (_, k, _) in zip(passes, levels, strict=True))


def check(levels: Levels, generators: Generators) -> None:
    """Raises CannotServe, with the reason, if the kernel is not made for such levels."""
    d = 2 ** levels[0][0]
    if not 64 <= d <= 2048:
        raise CannotServe(f"pallas_triton serves widths from 64 to 2048; x has {d}")
    for level in range(1, len(levels)):
        folded = fold(levels, generators, level)
        classes = len(folded.class_steps)
        held = passes_of(levels, generators, level) * PARENTS * MEMBERS * classes
        if held > MOST_CANDIDATES:
            has = f"level {level} has {levels[level - 1][1]} x {levels[level][2]}"
            raise CannotServe(f"pallas_triton keeps candidates in registers; {has}, too many")


def _in_order(folded: Fold) -> tuple[np.ndarray, ...]:
    """points [2, d / 2], matrix [d / 32, M, 32] and words [digits, 32, d / 32], by column.

    A column of a part has 32 points. Point j of its first 16 and point j + 16 are neighbours.
    """
    parts, members, size = folded.matrix.shape
    columns = size // 32
    pairs = folded.points.reshape(parts, 2, 16, columns).transpose(1, 0, 3, 2)
    matrix = folded.matrix.reshape(parts, members, 2, 16, columns).transpose(0, 4, 1, 3, 2)
    # Thread t of four has the points 4t to 4t + 3 of 16 in a product, and loads 8 neighbours.
    matrix = matrix.reshape(parts * columns, members, 2, 4, 4).swapaxes(2, 3)
    matrix = matrix.reshape(parts * columns, members, 32)
    return pairs.reshape(2, -1), matrix.astype(jnp.bfloat16), folded.words


def constants(scheme: Scheme) -> tuple[np.ndarray, ...]:
    """The `constant_refs` of `encode_token`: kernel inputs that no token or layer changes."""
    padded = [np.pad(hadamard(n), (0, max(16 - n, 0))) for n in grid(scheme.width)]
    result = [matrix.astype(jnp.bfloat16) for matrix in padded]
    for level in range(1, len(scheme.levels)):
        table, folded = scheme.children(level), fold(scheme.levels, scheme.generators, level)
        result += Level(
            table.group_of_parent, table.representatives, folded.member_steps, *_in_order(folded)
        )
    return tuple(result)


def tables(mean: Array, std: Array, bias: Array, scheme: Scheme) -> tuple[Array, ...]:
    """The `table_refs` of `encode_token`, float32: scale and offset of y = scale · sum + offset.

    They are [d] at level 0, then [groups, members, classes], so that the children of a parent lie
    together and a thread loads several classes at a time. Without `forward_standardized` the
    deviations and biases [F] follow.
    """
    deviation = jnp.maximum(std, STD_FLOOR)
    scale = 1 / deviation / np.float32(np.sqrt(scheme.width))
    offset = bias - all_scores(mean, scheme.levels[-1][0]) / deviation
    # The keys of -0 and 0 differ. Without a -0 in the offsets no sum makes one.
    offset = jnp.where(offset == 0, 0, offset)
    result = [scale[: scheme.width], offset[: scheme.width]]
    for level in range(1, len(scheme.levels)):
        folded = fold(scheme.levels, scheme.generators, level)
        steps = folded.member_steps[:, None] ^ np.array(folded.class_steps, np.int32)
        ids = scheme.children(level).representatives[:, None, None] ^ steps
        result += [scale[ids].reshape(-1), offset[ids].reshape(-1)]
    return tuple(result) if scheme.forward_standardized else (*result, deviation, bias)
