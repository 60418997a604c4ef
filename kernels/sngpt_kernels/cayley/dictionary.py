"""The dictionary of parity features: atoms, levels, and which children a feature has. Host side,
numpy only.

A feature is an integer f, its atom a character of F_2^n read at d = 2^t points: v_f[α] = d^(-1/2)
· (-1)^popc(f & w[α]). The low t bits of f choose a row of the Walsh-Hadamard matrix, the higher
bits a quadratic sign mask, a trace of cubes in GF(2^t). Most masks are bent or almost bent, so
that atoms are nearly orthogonal. Sources: Gold, "Maximal recursive sequences with 3-valued
recursive cross-correlation functions" (1968); Calderbank, Cameron, Kantor and Seidel, "Z4-Kerdock
codes, orthogonal spreads, and extremal Euclidean line-sets" (1997).

Field elements are integers, bit i the coefficient of z^i, g = 2 a generator. ⊕ is XOR and popc the
number of one bits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Levels = tuple[
    tuple[int, int, int], ...
]  # (n, k, degree): 2^n features with those of the levels before, k active, child budget
Generators = Literal["spread", "prefix"]

PRIMITIVE_POLYNOMIALS = {
    2: 0x7, 3: 0xB, 4: 0x13, 5: 0x25, 6: 0x43, 7: 0x83, 8: 0x11D, 9: 0x211, 10: 0x409, 11: 0x805, 12: 0x1053, 13: 0x201B,
    14: 0x4443, 15: 0x8003, 16: 0x1100B, 17: 0x20009, 18: 0x40081,
}  # fmt: skip
# of children: the dictionaries in use have 256 to 1024, and a table of them is made to check a
# level
MAX_DEGREE = 2**16
# of an id, which is int32: a sign bit and a spare bit for the mask of the backward pass are left
MAX_BITS = 30


def multiply(a: np.typing.ArrayLike, b: np.typing.ArrayLike, t: int) -> np.ndarray:
    """The product in GF(2^t), elementwise with broadcasting, int64; elements are the integers 0 …
    2^t - 1.
    """
    a, b = np.broadcast_arrays(np.asarray(a, np.int64), np.asarray(b, np.int64))
    product = np.zeros_like(a)
    for i in range(t):
        product = product ^ np.where(b >> i & 1, a, 0)
        a = a << 1
        a = np.where(a >> t & 1, a ^ PRIMITIVE_POLYNOMIALS[t], a)
    return product


def power(a: np.typing.ArrayLike, exponent: int, t: int) -> np.ndarray:
    """a^exponent in GF(2^t), elementwise, by repeated squaring."""
    a = np.asarray(a, np.int64)
    result = np.ones_like(a)
    while exponent:
        if exponent & 1:
            result = multiply(result, a, t)
        a, exponent = multiply(a, a, t), exponent >> 1
    return result


def trace(a: np.typing.ArrayLike, t: int) -> np.ndarray:
    """The field trace GF(2^t) → {0, 1}: a + a² + a⁴ + … + a^(2^(t-1)), elementwise."""
    a = np.asarray(a, np.int64)
    total = np.zeros_like(a)
    for _ in range(t):
        total, a = total ^ a, multiply(a, a, t)
    return total


def mask_basis(t: int) -> list[int]:
    """m_0 … m_(t-1) in GF(2^t), whose cubes' traces are the sign masks of the bits t … 2t-1 of a
    feature.
    """
    if t % 2 == 0 and t // 2 % 2 == 1:
        half = t // 2
        s = power(2, 2**half + 1, t)  # generates the subfield GF(2^(t/2))
        return [
            int(multiply(2, power(s, i, t), t)) if i < half else int(power(s, i - half, t))
            for i in range(t)
        ]
    return [int(power(2, i, t)) for i in range(t)]


@functools.cache
def trace_masks(d: int) -> np.ndarray:
    """w [d] int64, read-only: the atom of f is d^(-1/2) · (-1)^popc(f & w). `d` is a power of two
    from 4 to 2^18.
    """
    t = d.bit_length() - 1
    points = np.arange(d, dtype=np.int64)
    cubes = power(points, 3, t)
    w = points.copy()
    for i, m in enumerate(mask_basis(t)):
        w |= trace(multiply(m, cubes, t), t) << (t + i)
    w.setflags(write=False)
    return w


def signs(ids: np.typing.ArrayLike, d: int) -> np.ndarray:
    """√d times the atoms of `ids` [...]: ±1, int8 [..., d]."""
    odd = np.bitwise_count(np.asarray(ids, np.int64)[..., None] & trace_masks(d)) & 1
    return (1 - 2 * odd.astype(np.int8)).astype(np.int8)


def atoms(ids: np.typing.ArrayLike, d: int) -> np.ndarray:
    """The unit vectors v_f of the features `ids` [...], float64 [..., d].

    Raises ValueError where d is no power of two from 4 to 2^18, or an id no integer from 0 to d² -
    1.
    """
    if d not in (2**t for t in PRIMITIVE_POLYNOMIALS):
        raise ValueError(f"d is {d}; expected a power of two from 4 to 2^18")
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or np.any((ids < 0) | (ids >= d**2)):
        raise ValueError(f"ids hold something else than integers from 0 to d² - 1 = {d**2 - 1}")
    return signs(ids, d) / np.sqrt(d)


def inner_products(d: int, n: int) -> np.ndarray:
    """⟨v_f, v_f'⟩ for f ⊕ f' = 0 … 2^n - 1, float64 [2^n].

    (-1)^popc(f & w) · (-1)^popc(f' & w) = (-1)^popc((f ⊕ f') & w): an inner product depends on f ⊕
    f' alone, and all of them are one Walsh-Hadamard transform of the indicator of the w (the
    eigenvalues, over d, of the Cayley graph of F_2^n with the generators w).
    """
    values = np.zeros(2**n)
    values[trace_masks(d) & (2**n - 1)] = 1 / d  # the w differ in their low t bits already
    for i in range(n):
        pairs = values.reshape(-1, 2, 2**i)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(
            -1
        )
    return values


def coherence(d: int, n: int) -> float:
    """The largest |⟨v_f, v_f'⟩| among the features below 2^n."""
    return float(np.abs(inner_products(d, n)[1:]).max())


def child_generators(below: int, n: int, degree: int, kind: Generators) -> list[int]:
    """b_0, b_1, …, whose span U gives a parent f < 2^below the children f ⊕ u, u ∈ U with a
    non-zero part above bit `below`.

    "spread": log2(degree) generators with the low parts g^(7(i+1)) in GF(2^below), the first n -
    below of which carry the new bits, so that children lie far from their parent. "prefix": a
    plain prefix tree, the new bits alone; `degree` is not used.
    """
    new_bits = [1 << i for i in range(below, n)]
    if kind == "prefix":
        return new_bits
    low = [int(power(2, 7 * (i + 1), below)) for i in range(degree.bit_length() - 1)]
    return [b | (new_bits[i] if i < len(new_bits) else 0) for i, b in enumerate(low)]


def span(basis: Sequence[int]) -> np.ndarray:
    """All 2^len(basis) sums (XOR) of the basis, int64 [2^len(basis)]: that of the subset with the
    bits j at index j.
    """
    elements = np.zeros(1, np.int64)
    for b in basis:
        elements = np.concatenate([elements, elements ^ b])
    return elements


@dataclass(frozen=True, eq=False)
class Children:
    """The children of one level, arranged in groups (see `children`). All arrays are read-only."""

    group_of_parent: np.ndarray  # int32 [2^n of the level before]
    representatives: np.ndarray  # int32 [groups]: the lowest id of each group of parents
    # int32 [members]: the u with a new part; child j of group i is representatives[i] ⊕ steps[j]
    steps: np.ndarray
    # int64 [groups], descending: the sizes of the groups, parents of the level before alone
    most_parents: np.ndarray

    def fewest_candidates(self, parents: int) -> int:
        """How many distinct children that many distinct parents have at least."""
        groups = np.searchsorted(np.cumsum(self.most_parents), parents) + 1
        return int(groups) * len(self.steps)


@functools.cache
def children(levels: Levels, generators: Generators, level: int) -> Children:
    """The children of level ≥ 1 of valid `levels`.

    Let W be the u ∈ U without a new part, the span of the generators that carry no new bit. The
    children of f are the union, over the sums c ≠ 0 of the other generators, of the cosets f ⊕ c ⊕
    W. So two parents with f ⊕ f' ∈ W have the same children. Any other two have none in common: f
    ⊕ c ⊕ w = f' ⊕ c' ⊕ w' has equal new parts only if c = c', and then f ⊕ f' = w ⊕ w' ∈ W. The
    parents thus fall into the cosets of W, each with |U| - |W| children, the cosets' children
    partition the level, and the *set* of candidates of some parents is given by their distinct
    cosets.
    """
    below, n, degree = levels[level - 1][0], *levels[level][::2]
    basis = child_generators(below, n, degree, generators)
    inside = span(basis[n - below :])  # W
    lowest = np.arange(2**below, dtype=np.int64)
    # the least element of f ⊕ span(b_0 … b_i) is that of one of the two halves
    for b in basis[n - below :]:
        lowest = np.minimum(lowest, lowest[np.arange(2**below) ^ b])
    representatives, group_of_parent = np.unique(lowest, return_inverse=True)
    assert len(representatives) * len(inside) == 2**below
    everything = span(basis)
    first_parent = 0 if level == 1 else 2 ** levels[level - 2][0]
    sizes = np.bincount(group_of_parent[first_parent:], minlength=len(representatives))
    result = Children(
        group_of_parent=group_of_parent.astype(np.int32),
        representatives=representatives.astype(np.int32),
        steps=np.sort(everything[everything >> below > 0]).astype(np.int32),
        most_parents=np.sort(sizes)[::-1],
    )
    for array in vars(result).values():
        array.setflags(write=False)
    return result


def level_range(levels: Levels, level: int) -> range:
    """The ids that `level` owns: lower ids are features of the levels before."""
    return range(2 ** levels[level - 1][0] if level else 0, 2 ** levels[level][0])


def reachable(levels: Levels, level: int, generators: Generators = "spread") -> int:
    """How many features of `level` some parent, itself any feature of the level before, has as a
    child.
    """
    if level == 0:
        return 2 ** levels[0][0]
    table = children(levels, generators, level)
    return int(np.count_nonzero(table.most_parents)) * len(table.steps)


@functools.cache
def check_levels(levels: Levels, d: int, generators: Generators = "spread") -> None:
    """Raises ValueError, in one line, unless `levels` is a hierarchy over a model width of `d`."""
    if generators not in get_args(Generators):
        raise ValueError(f'generators is {generators!r}; expected "spread" or "prefix"')
    t = d.bit_length() - 1
    if d != 2 ** max(t, 0) or t not in PRIMITIVE_POLYNOMIALS:
        raise ValueError(
            f"a dictionary of parities needs a width that is a power of two from 4 to 2^18, got {d}"
        )
    if not levels or any(len(level) != 3 for level in levels):
        raise ValueError(f"levels is {levels}; expected at least one (n, k, degree)")
    if levels[0][0] != t:
        raise ValueError(
            f"level 0 has n = {levels[0][0]}; with width {d} it must be log2({d}) = {t}"
        )
    if levels[0][2] != 0:
        raise ValueError(
            f"level 0 has degree {levels[0][2]}; it has no parents, so its degree must be 0"
        )
    for level, (n, k, degree) in enumerate(levels):
        candidates = d
        if level:
            below = levels[level - 1][0]
            if n <= below:
                raise ValueError(
                    f"level {level} has n = {n}; it must exceed the n = {below} of the level before"
                )
            if n > min(2 * t, MAX_BITS):
                raise ValueError(
                    f"level {level} has n = {n}; with width {d} at most {min(2 * t, MAX_BITS)} is"
                    " possible"
                )
            if generators == "spread":
                _check_spread(level, below, n, degree)
            candidates = children(levels, generators, level).fewest_candidates(levels[level - 1][1])
        if not 1 <= k <= candidates:
            limit = "the fewest candidates it can have" if level else "the features it has"
            raise ValueError(f"level {level} has k = {k}; expected 1 to {candidates}, {limit}")


def _check_spread(level: int, below: int, n: int, degree: int) -> None:
    """Raises ValueError where the children of `level` have no spread generators."""
    if below not in PRIMITIVE_POLYNOMIALS:
        raise ValueError(
            f"level {level} needs a field of 2^{below} elements for its children; 2^18 is the"
            " largest there is"
        )
    if degree < 1 or degree & (degree - 1):
        raise ValueError(f"level {level} has degree {degree}; it must be a power of two")
    if degree > MAX_DEGREE:
        raise ValueError(f"level {level} has degree {degree}; at most {MAX_DEGREE} is possible")
    if degree > 2**n:
        raise ValueError(
            f"level {level} has degree {degree}; its ids have {n} bits, so that at most {2**n} can"
            " be children"
        )
    if degree < 2 ** (n - below):
        raise ValueError(
            f"level {level} has degree {degree}; its {n - below} new bits need at least"
            f" {2 ** (n - below)}"
        )
    if len(np.unique(span(child_generators(below, n, degree, "spread")))) < degree:
        raise ValueError(
            f"level {level} has degree {degree}; its child generators are not independent, take a"
            " smaller degree"
        )
