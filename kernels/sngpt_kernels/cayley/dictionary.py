"""The dictionary of parity features: its atoms, its levels and the children of a feature.

It runs on the host with numpy alone. `docs/cayley.md` defines the dictionary. Most sign masks are
bent or almost bent, so atoms are nearly orthogonal. Sources: Gold, "Maximal recursive sequences
with 3-valued recursive cross-correlation functions" (1968); Calderbank, Cameron, Kantor and Seidel,
"Z4-Kerdock codes, orthogonal spreads, and extremal Euclidean line-sets" (1997).

An integer stands for a field element: bit i is the coefficient of z^i, and g = 2 is a generator.
⊕ is XOR. popc is the number of one bits.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

STD_FLOOR = 1e-3  # the least divisor instead of a standard deviation; part of the definition

# (n, k, degree) per level: its ids are below 2^n, k are selected, degree bounds a parent's children
Levels = tuple[tuple[int, int, int], ...]
Generators = Literal["spread", "prefix"]

# by the degree t of the field GF(2^t)
PRIMITIVE_POLYNOMIALS = {
    2: 0x7, 3: 0xB, 4: 0x13, 5: 0x25, 6: 0x43, 7: 0x83, 8: 0x11D, 9: 0x211, 10: 0x409, 11: 0x805,
    12: 0x1053, 13: 0x201B, 14: 0x4443, 15: 0x8003, 16: 0x1100B, 17: 0x20009, 18: 0x40081,
}  # fmt: skip
MAX_DEGREE = 2**16  # `check_levels` makes a table of this size.
MAX_BITS = 30  # An id is an int32. The sign and the backward pass's mask take a bit each.


def multiply(a: ArrayLike, b: ArrayLike, t: int) -> np.ndarray:
    """The elementwise product in GF(2^t), int64. `a` and `b` hold 0 … 2^t - 1 and broadcast."""
    a, b = np.broadcast_arrays(np.asarray(a, np.int64), np.asarray(b, np.int64))
    product = np.zeros_like(a)
    for i in range(t):
        product = product ^ np.where(b >> i & 1, a, 0)
        a = a << 1
        a = np.where(a >> t & 1, a ^ PRIMITIVE_POLYNOMIALS[t], a)
    return product


def power(a: ArrayLike, exponent: int, t: int) -> np.ndarray:
    """The elementwise power a^exponent in GF(2^t)."""
    result = np.ones_like(a, np.int64)
    while exponent:
        if exponent & 1:
            result = multiply(result, a, t)
        a, exponent = multiply(a, a, t), exponent >> 1
    return result


def trace(a: ArrayLike, t: int) -> np.ndarray:
    """The field trace GF(2^t) → {0, 1}: a + a² + a⁴ + … + a^(2^(t-1)), elementwise."""
    a = np.asarray(a, np.int64)
    total = np.zeros_like(a)
    for _ in range(t):
        total, a = total ^ a, multiply(a, a, t)
    return total


def mask_basis(t: int) -> list[int]:
    """m_0 … m_(t-1) in GF(2^t). The trace of m_i · α³ is the sign mask of bit t + i."""
    if t % 4 != 2:
        return [int(power(2, i, t)) for i in range(t)]
    half = t // 2
    s = power(2, 2**half + 1, t)  # generates the subfield GF(2^half)
    subfield = [int(power(s, i, t)) for i in range(half)]
    return [*multiply(2, subfield, t).tolist(), *subfield]


@functools.cache
def trace_masks(d: int) -> np.ndarray:
    """w [d] int64, read-only: the atom of f is d^(-1/2) · (-1)^popc(f & w)."""
    t = d.bit_length() - 1
    w = np.arange(d)
    cubes = power(w, 3, t)
    for i, m in enumerate(mask_basis(t)):
        w |= trace(multiply(m, cubes, t), t) << (t + i)
    w.setflags(write=False)
    return w


@functools.cache
def derivatives(d: int, n_last: int) -> np.ndarray:
    """ℓ [2^n_last / d, d] int32, read-only: the derivatives of the sign masks.

    A sign mask is quadratic in α: with s_h[α] = (-1)^popc(h d & w[α]), the product
    s_h[α] s_h[α ⊕ δ] is s_h[δ] (-1)^popc(ℓ[h, δ] & α).
    """
    t = d.bit_length() - 1
    high, points = trace_masks(d) >> t, np.arange(d)
    masks = np.arange(2 ** (n_last - t))[:, None]
    result = np.zeros((len(masks), d), np.int32)
    for j in range(t):
        odd = np.bitwise_count(masks & (high[1 << j] ^ high[points ^ (1 << j)] ^ high)) & 1
        result |= odd.astype(np.int32) << j
    result.setflags(write=False)
    return result


def characters(ids: ArrayLike, points: np.ndarray) -> np.ndarray:
    """(-1)^popc(id & point) of `ids` [...] and `points` [P]: int8 [..., P]."""
    odd = np.bitwise_count(np.asarray(ids, np.int64)[..., None] & points) & 1
    return 1 - 2 * odd.astype(np.int8)


def signs(ids: ArrayLike, d: int) -> np.ndarray:
    """The atoms of `ids` [...] times √d: ±1, int8 [..., d]."""
    return characters(ids, trace_masks(d))


def hadamard(n: int) -> np.ndarray:
    """The Walsh-Hadamard matrix of size n, a power of two: int8 [n, n]."""
    return characters(np.arange(n), np.arange(n))


def atoms(ids: ArrayLike, d: int) -> np.ndarray:
    """The unit vectors v_f of the features `ids` [...], float64 [..., d].

    Raises ValueError if d is no power of two from 4 to 2^18 or an id is not in 0 … d² - 1.
    """
    if d not in (2**t for t in PRIMITIVE_POLYNOMIALS):
        raise ValueError(f"d is {d}; expected a power of two from 4 to 2^18")
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or np.any((ids < 0) | (ids >= d**2)):
        raise ValueError(f"ids must hold integers from 0 to d² - 1 = {d**2 - 1}")
    return signs(ids, d) / np.sqrt(d)


def child_generators(below: int, n: int, degree: int, kind: Generators) -> list[int]:
    """b_0, b_1, …, which span a set U of steps from a parent f < 2^below to its children.

    The children are f ⊕ u for every u ∈ U with a new part, which is a one among the bits from
    `below` on. "spread" has log2(degree) generators with the low parts g^(7(i+1)) in GF(2^below),
    and the first ones carry the new bits. "prefix" has the new bits alone.
    """
    new_bits = [1 << i for i in range(below, n)]
    if kind == "prefix":
        return new_bits
    low = [int(power(2, 7 * (i + 1), below)) for i in range(degree.bit_length() - 1)]
    return [b | new for b, new in itertools.zip_longest(low, new_bits, fillvalue=0)]


def span(basis: Sequence[int]) -> np.ndarray:
    """int64 [2^len(basis)]: index j holds the XOR of the elements whose bits are set in j."""
    elements = np.zeros(1, np.int64)
    for b in basis:
        elements = np.concatenate([elements, elements ^ b])
    return elements


@dataclass(frozen=True, eq=False)
class Children:
    """The children of one level in groups, as `children` explains. All arrays are read-only."""

    group_of_parent: np.ndarray  # int32 [2^n of the level before]
    representatives: np.ndarray  # int32 [groups]: the lowest id of each group of parents
    steps: np.ndarray  # int32 [members]: child j of group i is representatives[i] ⊕ steps[j]
    most_parents: np.ndarray  # int64 [groups], descending: parents of the level before in a group

    def fewest_candidates(self, parents: int) -> int:
        """The least number of distinct children of so many distinct parents."""
        groups = np.searchsorted(np.cumsum(self.most_parents), parents) + 1
        return int(groups) * len(self.steps)


@functools.cache
def children(levels: Levels, generators: Generators, level: int) -> Children:
    """The children of level ≥ 1 of valid `levels`.

    Let W be the u ∈ U without a new part: the span of the generators that carry no new bit. The
    children of f are the union of the cosets f ⊕ c ⊕ W over the sums c ≠ 0 of the other
    generators. So two parents with f ⊕ f' ∈ W have the same children. Any other two share no child:
    f ⊕ c ⊕ w = f' ⊕ c' ⊕ w' has equal new parts only if c = c', and then f ⊕ f' = w ⊕ w' ∈ W. The
    parents therefore fall into the cosets of W, and each coset has |U| - |W| children.
    """
    below, n, degree = levels[level - 1][0], *levels[level][::2]
    basis = child_generators(below, n, degree, generators)
    parents = np.arange(2**below)
    lowest = parents
    # f ⊕ span(b_0 … b_i) has two halves, and its least element is in one of them
    for b in basis[n - below :]:
        lowest = np.minimum(lowest, lowest[parents ^ b])
    representatives, group_of_parent = np.unique(lowest, return_inverse=True)
    own = level_range(levels, level - 1).start
    sizes = np.bincount(group_of_parent[own:], minlength=len(representatives))
    steps = np.sort(span(basis))
    result = Children(
        group_of_parent=group_of_parent.astype(np.int32),
        representatives=representatives.astype(np.int32),
        steps=steps[steps >> below > 0].astype(np.int32),
        most_parents=np.sort(sizes)[::-1],
    )
    for array in vars(result).values():
        array.setflags(write=False)
    return result


def level_range(levels: Levels, level: int) -> range:
    """The ids that `level` owns. Lower ids are features of the levels before."""
    return range(2 ** levels[level - 1][0] if level else 0, 2 ** levels[level][0])


def reachable(levels: Levels, level: int, generators: Generators = "spread") -> int:
    """How many features of `level` are a child of some feature of the level before."""
    if level == 0:
        return 2 ** levels[0][0]
    table = children(levels, generators, level)
    return int(np.count_nonzero(table.most_parents)) * len(table.steps)


@dataclass(frozen=True)
class Scheme:
    """The static arguments of `api.encode_decode`, which describes them."""

    levels: Levels
    forward_standardized: bool = True
    generators: Generators = "spread"

    @property
    def width(self) -> int:
        """d."""
        return 2 ** self.levels[0][0]

    @property
    def features(self) -> int:
        """F, the number of ids over all levels."""
        return 2 ** self.levels[-1][0]

    @property
    def active(self) -> int:
        """A = Σk, the selected features per token."""
        return sum(k for _, k, _ in self.levels)

    def children(self, level: int) -> Children:
        """`children` of `level` ≥ 1."""
        return children(self.levels, self.generators, level)


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


@functools.cache
def check_levels(levels: Levels, d: int, generators: Generators = "spread") -> None:
    """Raises ValueError unless `levels` is a hierarchy over a model width of `d`."""
    _require(
        generators in get_args(Generators),
        f'generators is {generators!r}; expected "spread" or "prefix"',
    )
    t = d.bit_length() - 1
    _require(
        t in PRIMITIVE_POLYNOMIALS and d == 2**t,
        f"a dictionary of parities needs a width that is a power of two from 4 to 2^18, got {d}",
    )
    shaped = bool(levels) and all(len(level) == 3 for level in levels)
    _require(shaped, f"levels is {levels}; expected at least one (n, k, degree)")
    root, _, degree = levels[0]
    _require(root == t, f"level 0 has n = {root}; with width {d} it must be log2({d}) = {t}")
    _require(degree == 0, f"level 0 has degree {degree}; it has no parents, so it must be 0")
    candidates, limit = d, "the features it has"
    for level, (n, k, degree) in enumerate(levels):
        if level:
            below, most = levels[level - 1][0], min(2 * t, MAX_BITS)
            has = f"level {level} has n = {n}"
            _require(n > below, f"{has}; it must exceed the n = {below} of the level before")
            _require(n <= most, f"{has}; with width {d} at most {most} is possible")
            if generators == "spread":
                _check_spread(level, below, n, degree)
            candidates = children(levels, generators, level).fewest_candidates(levels[level - 1][1])
            limit = "the fewest candidates it can have"
        fits = f"level {level} has k = {k}; expected 1 to {candidates}, {limit}"
        _require(1 <= k <= candidates, fits)


def _check_spread(level: int, below: int, n: int, degree: int) -> None:
    has, new = f"level {level} has degree {degree}", n - below
    _require(
        below in PRIMITIVE_POLYNOMIALS,
        f"level {level} needs a field of 2^{below} elements for its children; the largest is 2^18",
    )
    _require(degree > 0 and degree & (degree - 1) == 0, f"{has}; it must be a power of two")
    _require(degree <= MAX_DEGREE, f"{has}; at most {MAX_DEGREE} is possible")
    _require(degree <= 2**n, f"{has}; its ids have {n} bits, so at most {2**n} is possible")
    _require(degree >= 2**new, f"{has}; its {new} new bits need at least {2**new}")
    distinct = len(np.unique(span(child_generators(below, n, degree, "spread"))))
    _require(distinct == degree, f"{has}; its child generators are dependent, lower it")
