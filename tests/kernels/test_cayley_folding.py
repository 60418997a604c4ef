"""The folded scores of a parent's children against the definition, and the constants' layout."""

import numpy as np
import pytest
from sngpt_kernels.cayley import dictionary, folding, reference
from sngpt_kernels.cayley.folding import fold

from tests.kernels.cayley_checks import D64, D128, D1024, D2048

D512 = ((9, 8, 0), (12, 8, 64), (13, 8, 4))
CASES = [
    (levels, generators, level)
    for levels in (D64, D128, D512, D1024, D2048)
    for generators in ("spread", "prefix")
    for level in (1, 2)
]


def folded_sums(folded, x, parent):
    """Σ_α x_α s_f(α) s_u(α) for u = class_steps[i] ⊕ member_steps[j]: [C, M], as in the kernel."""
    signed = x * dictionary.signs(parent, len(x))
    of_part = np.einsum("pmk,pk->pm", folded.matrix.astype(np.float64), signed[folded.points])
    of_class = of_part.reshape(len(folded.class_steps), -1, of_part.shape[1]).sum(1)
    index = np.arange(len(of_class))
    transform = 1 - 2.0 * (np.bitwise_count(index[:, None] & index) & 1)
    return transform @ of_class


@pytest.mark.parametrize(("levels", "generators", "level"), CASES)
def test_folded_scores_are_those_of_the_children(levels, generators, level):
    folded, d = fold(levels, generators, level), 2 ** levels[0][0]
    rng = np.random.default_rng(0)
    x, parent = rng.standard_normal(d), int(rng.integers(2 ** levels[level - 1][0]))
    steps = np.array(folded.class_steps)[:, None] ^ folded.member_steps[: folded.members]
    sums = folded_sums(folded, x, parent)
    expected = reference.scores(x, parent ^ steps.reshape(-1)).reshape(steps.shape) * np.sqrt(d)
    error = np.abs(sums[:, : folded.members] - expected)
    print(f"{len(folded.class_steps)} classes: error max {error.max():.1e}")
    assert error.max() < 1e-10 * np.sqrt(d)
    assert not sums[:, folded.members :].any()
    member = np.arange(folded.members)
    assert set(steps[:, member % 2**folded.new_bits > 0].flat) == reference.child_steps(
        levels, level, generators
    )


@pytest.mark.parametrize(("levels", "generators", "level"), CASES)
def test_classes_are_equal_parts_of_the_points(levels, generators, level):
    folded, d = fold(levels, generators, level), 2 ** levels[0][0]
    classes = len(folded.class_steps)
    assert folded.points.shape[1] == min(d // classes, folding.MOST_POINTS)
    assert sorted(folded.points.flat) == list(range(d))
    for step in folded.class_steps:
        assert step < 2 ** levels[level - 1][0]  # no new part
        signs = dictionary.signs(step, d)[folded.points].reshape(classes, -1)
        assert (signs == signs[:, :1]).all()


@pytest.mark.parametrize(("levels", "generators", "level"), CASES)
def test_words_hold_the_signs_of_parents_part_by_part(levels, generators, level):
    folded, below = fold(levels, generators, level), levels[level - 1][0]
    parent, d = int(np.random.default_rng(1).integers(2**below)), 2 ** levels[0][0]
    rows = [folded.words[c, (parent >> 5 * c) & 31] for c in range(len(folded.words))]
    words = np.bitwise_xor.reduce(rows).view(np.uint32)  # [d / 32]
    bits = (words >> np.arange(32)[:, None]) & 1  # [32, d / 32]
    parts = len(folded.points)
    expected = dictionary.signs(parent, d)[folded.points].reshape(parts, 32, -1) < 0
    np.testing.assert_array_equal(bits.reshape(32, parts, -1).swapaxes(0, 1), expected)


@pytest.mark.parametrize("levels", [D1024, D2048])
def test_the_recipes_have_eight_classes_of_32_members(levels):
    for level in (1, 2):
        folded = fold(levels, "spread", level)
        assert (len(folded.class_steps), folded.members) == (8, 32)
