"""Constants, made on the host, with which a kernel scores all children of a parent at once.

The children of a parent f are f ⊕ u with u in a span U. The atom of f ⊕ u is √d · v_f · v_u
elementwise. So the children's scores are the products of x, with its signs flipped by f, and the
±1 vectors of U. A basis of U is chosen in two parts, class bits and member bits:
u = class_steps[j1] ⊕ member_steps[j2]. The class bits split the d points into classes in which a
vector of the first part is constant. So the kernel sums over the members within each class, which
is a product with a constant ±1 matrix. Then a small Walsh-Hadamard transform combines the sums of
the classes:

    Σ_α x_α s_f(α) s_u(α) = Σ_class (-1)^<j1, class> S(class, j2)
    S(class, j2) = Σ_{α in class} x_α s_f(α) (-1)^<j2, member bits of α>

With C classes a parent takes d · |U| / C multiply-adds instead of d · |U|, and the matrices are
smaller by C as well.
"""

import functools
from dataclasses import dataclass

import numpy as np

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.dictionary import Generators, Levels
from sngpt_kernels.cayley.sign_words import sign_words

# The transform across classes keeps one tile of sums per class in registers.
MOST_CLASS_BITS = 3
# Four warps share the members of a tile, and a tensor core's tile has 8 columns.
FEWEST_MEMBER_BITS = 5
WORD_BITS = 5  # A class holds whole words of 32 signs.
# The points of one part of a class. Both operands of a part's product are in registers.
MOST_POINTS = 128


@dataclass(frozen=True, eq=False)
class Fold:
    """The constants of one level: C classes of K = d / C points, M members.

    Arrays are read-only.
    """

    class_steps: tuple[int, ...]  # the C sums of class bits, none with a new part
    # int32 [M]: the sums of the member bits, and zeros from `members` on
    member_steps: np.ndarray
    members: int  # how many of the M ≥ 32 rows are members
    # Member j has a new part if any of the lowest `new_bits` bits of j is set.
    new_bits: int
    points: np.ndarray  # int32 [d / K, K]: the points of each part, class by class
    # int8 [d / K, M, K]: (-1)^<j2, member bits of the point>, and zeros from row `members` on
    matrix: np.ndarray
    # int32 [digits, 32, d / 32]: `sign_words` of the parents, K / 32 words per part
    words: np.ndarray


def _balanced_subspace(elements: np.ndarray, d: int, bits: int) -> list[int]:
    """The largest basis of at most `bits` of `elements` that splits d points into equal classes.

    The classes are equal exactly if the ±1 vector of every sum of the basis adds up to 0.
    """
    sums = dictionary.signs(elements, d).sum(-1, dtype=np.int64)
    balanced = set(elements[sums == 0].tolist())

    def extend(basis: list[int], candidates: list[int]) -> list[int]:
        best = basis
        if len(basis) < bits:
            sums = dictionary.span(basis).tolist()
            for u in candidates:
                if u in sums or any(u ^ s not in balanced for s in sums):
                    continue
                best = max(best, extend([*basis, u], [v for v in candidates if v > u]), key=len)
                if len(best) == bits:
                    break
        return best

    return extend([], sorted(balanced))


@functools.cache
def fold(levels: Levels, generators: Generators, level: int) -> Fold:
    """The fold of level ≥ 1 of valid `levels` with d ≥ 32."""
    d, below, n = 2 ** levels[0][0], levels[level - 1][0], levels[level][0]
    basis = dictionary.child_generators(below, n, levels[level][2], generators)
    inherited = basis[n - below :]  # the generators without a new part
    most = min(MOST_CLASS_BITS, len(basis) - FEWEST_MEMBER_BITS, d.bit_length() - 1 - WORD_BITS)
    class_bits = _balanced_subspace(dictionary.span(inherited), d, max(most, 0))
    member_bits: list[int] = []
    for b in basis:  # generators with new parts come first
        if b not in dictionary.span([*class_bits, *member_bits]):
            member_bits.append(b)
    w = dictionary.trace_masks(d)
    classes = sum(
        (np.bitwise_count(b & w).astype(np.int64) & 1) << i for i, b in enumerate(class_bits)
    ) + np.zeros(d, np.int64)
    points = np.argsort(classes, kind="stable").reshape(-1, min(d >> len(class_bits), MOST_POINTS))
    members = 2 ** len(member_bits)
    rows = max(members, 2**FEWEST_MEMBER_BITS)
    member_steps = np.zeros(rows, np.int32)
    member_steps[:members] = dictionary.span(member_bits)
    matrix = np.zeros((len(points), rows, points.shape[1]), np.int8)
    matrix[:, :members] = dictionary.signs(member_steps[:members], d)[:, points].swapaxes(0, 1)
    # [32, parts, words]: bit i of every part's words
    by_word = points.reshape(len(points), 32, -1).swapaxes(0, 1).reshape(-1)
    result = Fold(
        class_steps=tuple(dictionary.span(class_bits).tolist()),
        member_steps=member_steps,
        members=members,
        new_bits=n - below,
        points=points.astype(np.int32),
        matrix=matrix,
        words=sign_words(w[by_word], below),
    )
    for array in (result.member_steps, result.points, result.matrix, result.words):
        array.setflags(write=False)
    return result


def hadamard(n: int) -> np.ndarray:
    """The Walsh-Hadamard matrix of size n, a power of two: int8, padded to at least [16, 16]."""
    index = np.arange(n)
    matrix = np.zeros((max(n, 16),) * 2, np.int8)
    matrix[:n, :n] = 1 - 2 * (np.bitwise_count(index[:, None] & index) & 1).astype(np.int8)
    return matrix
