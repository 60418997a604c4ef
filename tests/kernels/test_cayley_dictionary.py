"""The dictionary against algebra and against sums done the long way."""

import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sngpt_kernels.cayley import dictionary, reference

from tests.kernels.cayley_checks import D128 as TINY
from tests.kernels.cayley_checks import D1024 as SMALL
from tests.kernels.cayley_checks import D2048 as LARGE


@functools.cache
def inner_products(d, n):
    """⟨v_f, v_f'⟩ for f ⊕ f' = 0 … 2^n - 1, float64 [2^n].

    An inner product depends on f ⊕ f' alone. All of them are one Walsh-Hadamard transform of the
    indicator of the masks w. They are the eigenvalues, over d, of the Cayley graph of F_2^n with
    the generators w.
    """
    values = np.zeros(2**n)
    values[dictionary.trace_masks(d) & (2**n - 1)] = 1 / d
    for i in range(n):
        low, high = values.reshape(-1, 2, 2**i).swapaxes(0, 1)
        values = np.stack([low + high, low - high], axis=1).reshape(-1)
    return values


def coherence(d, n):
    """The largest |⟨v_f, v_f'⟩| among the features below 2^n."""
    return float(np.abs(inner_products(d, n)[1:]).max())


def prime_factors(n):
    factors, p = set(), 2
    while p * p <= n:
        while n % p == 0:
            factors.add(p)
            n //= p
        p += 1
    return factors | ({n} if n > 1 else set())


@pytest.mark.parametrize("t", range(2, 19))
def test_polynomials_are_primitive(t):
    order = 2**t - 1
    assert dictionary.PRIMITIVE_POLYNOMIALS[t].bit_length() == t + 1
    assert dictionary.power(2, order, t) == 1
    assert all(dictionary.power(2, order // p, t) != 1 for p in prime_factors(order))


def test_field_against_polynomial_division():
    t, modulus = 6, dictionary.PRIMITIVE_POLYNOMIALS[6]
    for a, b in itertools.product(range(2**t), repeat=2):
        product = 0
        for i in range(t):
            product ^= (a << i) * (b >> i & 1)
        for i in reversed(range(t, 2 * t)):
            if product >> i & 1:
                product ^= modulus << (i - t)
        assert dictionary.multiply(a, b, t) == product


@pytest.mark.parametrize("t", [3, 4, 10])
def test_trace_is_linear_balanced_and_frobenius_invariant(t):
    elements = np.arange(2**t)
    trace = dictionary.trace(elements, t)
    assert set(trace) == {0, 1} and trace.sum() == 2 ** (t - 1)
    assert (dictionary.trace(elements ^ 5, t) == trace ^ dictionary.trace(5, t)).all()
    assert (dictionary.trace(dictionary.multiply(elements, elements, t), t) == trace).all()


def test_mask_basis_at_1024():
    """Five elements g·s^i and five of the subfield GF(2^5) together span GF(2^10)."""
    basis = dictionary.mask_basis(10)
    assert len(np.unique(dictionary.span(basis))) == 2**10
    assert all(dictionary.power(m, 2**5, 10) == m for m in basis[5:])  # x^32 = x there
    assert all(dictionary.power(m, 2**5, 10) != m for m in basis[:5])


@pytest.mark.parametrize("d", [4, 8, 64, 128])
def test_atoms_of_a_coset_of_the_masks_are_an_orthonormal_basis(d):
    for mask in range(0, d * d, d)[:8]:
        basis = dictionary.atoms(mask + np.arange(d), d)
        np.testing.assert_allclose(basis @ basis.T, np.eye(d), atol=1e-12)


def test_first_level_is_the_walsh_hadamard_matrix():
    matrix = np.ones((1, 1))
    while len(matrix) < 16:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    np.testing.assert_array_equal(dictionary.atoms(np.arange(16), 16), matrix / 4)


def test_levels_0_and_1_at_1024_are_32_mutually_unbiased_bases():
    products = np.abs(inner_products(1024, 15))
    assert set(products[1:1024]) == {0}  # f ⊕ f' without a mask: inside one basis
    assert set(products[1024:]) == {1 / 32}
    basis = dictionary.atoms(7 * 1024 + np.arange(1024), 1024)
    other = dictionary.atoms(29 * 1024 + np.arange(0, 1024, 8), 1024)
    np.testing.assert_allclose(np.abs(basis @ other.T), 1 / 32, atol=1e-12)


def test_coherence():
    assert coherence(1024, 15) == 1 / 32
    assert coherence(1024, 17) == 1 / 16
    assert coherence(2048, 17) == 1 / 32


def test_masks_of_level_2_that_are_not_bent():
    products = np.abs(inner_products(1024, 17)).reshape(128, 1024)
    assert np.count_nonzero(products[32:].max(1) > 1 / 32) == 33


@given(st.integers(0, 2**17 - 1), st.integers(0, 2**17 - 1), st.integers(0, 2**17 - 1))
def test_inner_products_depend_on_the_sum_of_the_ids_alone(f, g, shift):
    a, b, c, e = dictionary.atoms(np.array([f, g, f ^ shift, g ^ shift]), 1024)
    np.testing.assert_allclose([a @ b, c @ e], inner_products(1024, 17)[f ^ g], atol=1e-12)


@pytest.mark.parametrize(("d", "n"), [(4, 2), (16, 7), (64, 12)])
def test_derivatives_of_the_masks_are_linear(d, n):
    points = np.arange(d)
    masks = dictionary.signs(np.arange(0, 2**n, d), d)[:, None]
    products = masks * masks[..., points[:, None] ^ points].squeeze(1)
    linear = dictionary.characters(dictionary.derivatives(d, n), points)
    np.testing.assert_array_equal(products, masks.squeeze(1)[..., None] * linear)


def test_reachable_counts():
    assert [dictionary.reachable(SMALL, level) for level in range(3)] == [1024, 31744, 98304]
    assert [dictionary.reachable(LARGE, level) for level in range(3)] == [2048, 30720, 98304]


@pytest.mark.parametrize(
    ("levels", "generators"),
    [(SMALL, "spread"), (LARGE, "spread"), (TINY, "spread"), (SMALL, "prefix")],
)
def test_every_id_has_the_possible_parents_that_the_definition_states(levels, generators):
    for level in (1, 2):
        parents = np.array(dictionary.level_range(levels, level - 1))
        own = dictionary.level_range(levels, level)
        steps = np.array(sorted(reference.child_steps(levels, level, generators)))
        counts = np.zeros(own.stop, np.int64)
        for u in steps:
            counts[parents ^ u] += 1  # distinct ids for distinct parents
        assert not counts[: own.start].any()
        counts = counts[own.start :]
        assert counts.sum() == len(parents) * len(steps)
        # a tree over all lower ids: those below the parents' own have no children here
        if generators == "prefix":
            assert (len(steps), set(counts)) == ((31, {1}), (3, {0, 1}))[level - 1]
        elif level == 1:
            of = {SMALL: (248, {8}), LARGE: (240, {16}), TINY: (28, {4})}
            assert (len(steps), set(counts)) == of[levels]
        else:
            of = (24, 6, 8) if levels is TINY else (192, 56, 64)
            assert (len(steps), counts.min(), counts.max()) == of
        assert np.count_nonzero(counts) == dictionary.reachable(levels, level, generators)


@pytest.mark.parametrize("generators", ["spread", "prefix"])
@pytest.mark.parametrize("level", [1, 2])
def test_groups_of_parents_are_the_parents_with_equal_child_sets(level, generators):
    steps = reference.child_steps(TINY, level, generators)
    table = dictionary.children(TINY, generators, level)
    naive = [frozenset(f ^ u for u in steps) for f in range(2 ** TINY[level - 1][0])]
    grouped = [frozenset((r ^ table.steps).tolist()) for r in table.representatives]
    assert [grouped[g] for g in table.group_of_parent] == naive
    # no two have a child in common
    assert sum(map(len, grouped)) == len(frozenset().union(*grouped))
    sizes = np.bincount([table.group_of_parent[f] for f in dictionary.level_range(TINY, level - 1)])
    assert table.most_parents.tolist() == sorted(
        np.pad(sizes, (0, len(grouped) - len(sizes))).tolist(), reverse=True
    )


def test_fewest_candidates_is_that_of_the_worst_parents():
    table = dictionary.children(SMALL, "spread", 1)
    assert [table.fewest_candidates(n) for n in (1, 8, 9, 16)] == [248, 248, 496, 496]
    group = np.flatnonzero(table.group_of_parent == 3)
    steps = reference.child_steps(SMALL, 1, "spread")
    assert len(group) == 8 and len({int(f) ^ u for f in group for u in steps}) == 248


@pytest.mark.parametrize(
    ("levels", "d", "complaint"),
    [
        (((9, 4, 0),), 1024, "n = 9; with width 1024 it must be log2(1024) = 10"),
        (((10, 4, 0),), 1000, "power of two from 4 to 2^18, got 1000"),
        (((1, 1, 0),), 2, "power of two from 4 to 2^18, got 2"),
        (((19, 4, 0),), 2**19, "power of two from 4 to 2^18, got 524288"),
        (((10, 4, 0), (10, 4, 32)), 1024, "must exceed the n = 10"),
        (((5, 4, 0), (8, 4, 8), (11, 4, 8)), 32, "with width 32 at most 10"),
        (((10, 4, 0), (19, 4, 512), (20, 4, 16)), 1024, "field of 2^19"),
        (((10, 4, 2),), 1024, "degree 2; it has no parents"),
        (((10, 4, 0), (15, 4, 48)), 1024, "degree 48; it must be a power of two"),
        (((10, 4, 0), (15, 4, 16)), 1024, "degree 16; its 5 new bits need at least 32"),
        (((3, 4, 0), (4, 4, 16)), 8, "are dependent"),
        (((10, 0, 0),), 1024, "k = 0; expected 1 to 1024"),
        (((10, 1025, 0),), 1024, "k = 1025; expected 1 to 1024"),
        (((10, 8, 0), (15, 249, 256)), 1024, "level 1 has k = 249; expected 1 to 248"),
        ((), 1024, "at least one"),
        (((10, 8),), 1024, "at least one"),
    ],
)
def test_impossible_levels(levels, d, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        dictionary.check_levels(levels, d)
    assert "\n" not in str(error.value)


def test_levels_of_the_published_models_are_possible():
    for levels in (SMALL, SMALL[:2], SMALL[:1], LARGE, LARGE[:2], TINY):
        for generators in ("spread", "prefix"):
            dictionary.check_levels(levels, 2 ** levels[0][0], generators)


def test_degree_does_not_bind_prefix_children():
    dictionary.check_levels(((10, 16, 0), (15, 32, 3)), 1024, "prefix")
    with pytest.raises(ValueError, match="k = 497; expected 1 to 496"):
        dictionary.check_levels(((10, 16, 0), (15, 497, 256)), 1024, "prefix")
    with pytest.raises(ValueError, match='"spread" or "prefix"'):
        dictionary.check_levels(((10, 16, 0),), 1024, "random")


@pytest.mark.parametrize(
    ("ids", "d"),
    [(1, 100), (1, 2), (1, 0), (-1, 128), (2**14, 128), (1.5, 128), ([1, 2**20], 1024)],
)
def test_atoms_that_are_none(ids, d):
    with pytest.raises(ValueError, match=r"d is|ids must hold"):
        dictionary.atoms(ids, d)


def test_a_degree_beyond_the_ids_is_refused_before_its_span_is_made():
    with pytest.raises(ValueError, match="degree 340282366920938463463374607431768211456"):
        dictionary.check_levels(((7, 4, 0), (14, 8, 2**128)), 128)
