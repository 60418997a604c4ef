"""Constants, made on the host, with which a kernel scores all children of a parent at once.

The children of a parent f are f ⊕ u with u in a span U. Their scores are the products of x, with
its signs flipped by f, and the ±1 vectors of U. A basis of U is chosen in two parts, class bits and
member bits: u = class_steps[j1] ⊕ member_steps[j2]. The class bits split the d points into classes
in which a vector of the first part is constant. So the kernel multiplies each class with a constant
±1 matrix, and a small Walsh-Hadamard transform combines the sums of the classes:

    Σ_α x_α s_f(α) s_u(α) = Σ_class (-1)^<j1, class> S(class, j2)
    S(class, j2) = Σ_{α in class} x_α s_f(α) (-1)^<j2, member bits of α>

With C classes, multiply-adds and matrices are smaller by C.
"""

import functools
from dataclasses import dataclass

import numpy as np

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.dictionary import Generators, Levels

MOST_CLASS_BITS = 3  # The transform keeps one tile of sums per class in registers.
FEWEST_MEMBER_BITS = 5  # An array of members has at least 32 rows.
WORD_BITS = 5  # A class holds whole words of 32 signs.
MOST_POINTS = 128  # of a part of a class, so that a product's operands fit into registers
DIGIT_BITS = 5  # The tables of all digits take 4 to 40 kB and stay in a GPU's L1 cache.


def sign_words(masks: np.ndarray, n: int, digit_bits: int = DIGIT_BITS) -> np.ndarray:
    """The signs of the features below 2^n at P `masks` int64 as bits.

    Returns int32 [digits, entries, P/32]. The exclusive or of a feature's words has the signs of 32
    points. There is one table per digit of the feature. Bit i of word j belongs to mask
    i·(P/32) + j. It is set if the parity popc(f & w) is odd. A population count per point would run
    at a quarter of the rate.
    """
    digits = np.arange(0, n, digit_bits)[:, None]
    features = np.arange(2**digit_bits) << digits
    odd = np.bitwise_count(features[..., None, None] & masks.reshape(32, -1)) & 1
    bits = odd.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(bits, axis=-2).view(np.int32)


@dataclass(frozen=True, eq=False)
class Fold:
    """The constants of one level: C classes of K = d / C points, M ≥ 32 rows of members.

    Arrays are read-only.
    """

    class_steps: tuple[int, ...]  # the C sums of class bits, none with a new part
    member_steps: np.ndarray  # int32 [M]: the sums of the member bits, then zeros
    members: int  # how many of the M rows are members
    new_bits: int  # Member j has a new part if any of the lowest `new_bits` bits of j is set.
    points: np.ndarray  # int32 [d / K, K]: the points of each part, class by class
    matrix: np.ndarray  # int8 [d / K, M, K]: the signs of the members, then rows of zeros
    words: np.ndarray  # int32 [digits, 32, d / 32]: `sign_words` of the parents, part by part


def _balanced_subspace(elements: np.ndarray, d: int, bits: int) -> list[int]:
    """The largest basis of at most `bits` of `elements` that splits d points into equal classes:
    the ±1 vector of every sum of the basis adds up to 0.
    """
    sums = dictionary.signs(elements, d).sum(-1, dtype=np.int64)
    balanced = set(elements[sums == 0].tolist())

    def extend(basis: list[int], candidates: list[int]) -> list[int]:
        best = basis
        sums = set(dictionary.span(basis).tolist())
        for i, u in enumerate(candidates):
            if len(best) == bits:
                break
            if u not in sums and balanced.issuperset(u ^ s for s in sums):
                best = max(best, extend([*basis, u], candidates[i + 1 :]), key=len)
        return best

    return extend([], sorted(balanced))


@functools.cache
def fold(levels: Levels, generators: Generators, level: int) -> Fold:
    """The fold of level ≥ 1 of valid `levels` with d ≥ 32."""
    d, below, (n, _, degree) = 2 ** levels[0][0], levels[level - 1][0], levels[level]
    basis = dictionary.child_generators(below, n, degree, generators)
    inherited = dictionary.span(basis[n - below :])  # the steps without a new part
    most = min(MOST_CLASS_BITS, len(basis) - FEWEST_MEMBER_BITS, d.bit_length() - 1 - WORD_BITS)
    class_bits = _balanced_subspace(inherited, d, max(most, 0))
    member_bits: list[int] = []
    for b in basis:  # generators with new parts come first
        if b not in dictionary.span([*class_bits, *member_bits]):
            member_bits.append(b)
    w = dictionary.trace_masks(d)
    classes = np.zeros(d, np.int64)
    for i, b in enumerate(class_bits):
        classes |= (np.bitwise_count(b & w).astype(np.int64) & 1) << i
    points = np.argsort(classes, kind="stable").reshape(-1, min(d >> len(class_bits), MOST_POINTS))
    parts, size = points.shape
    members = 2 ** len(member_bits)
    missing = max(2**FEWEST_MEMBER_BITS - members, 0)
    member_steps = dictionary.span(member_bits).astype(np.int32)
    matrix = dictionary.signs(member_steps, d)[:, points].swapaxes(0, 1)
    # [32, parts, words]: bit i of every part's words
    by_word = points.reshape(parts, 32, size // 32).swapaxes(0, 1).reshape(-1)
    result = Fold(
        class_steps=tuple(dictionary.span(class_bits).tolist()),
        member_steps=np.pad(member_steps, (0, missing)),
        members=members,
        new_bits=n - below,
        points=points.astype(np.int32),
        matrix=np.pad(matrix, ((0, 0), (0, missing), (0, 0))),
        words=sign_words(w[by_word], below),
    )
    for array in (result.member_steps, result.points, result.matrix, result.words):
        array.setflags(write=False)
    return result
