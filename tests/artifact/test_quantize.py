"""The grids: scales and codes against float64, and what cannot be put on a grid."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.artifact import quantize
from sngpt_jax.artifact.policy import Policy
from sngpt_jax.artifact.quantize import (
    Quantized,
    code_range,
    dequantize,
    nearest_codes,
    prune,
    row_scales,
)
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import ExportConfig
from sngpt_jax.optim import qat

PUBLISHED = [  # bits, codes, and the ranges that the public Parameter Golf scripts store
    (5, "full", -16, 15),
    (5, "symmetric", -15, 15),
    (6, "full", -32, 31),
    (6, "symmetric", -31, 31),
    (8, "full", -128, 127),
]
SMALLEST_NORMAL = 2.0**-14  # of float16


def policy(bits=5, clip="row_max", sd=3.0, transposed=False):
    return Policy("mlp", bits, clip, sd, transposed)


def random_rows(seed, rows, columns, magnitude=0.1):
    """Rows of different sizes, means and tails, so that no rule can pass for another."""
    rng, column = np.random.default_rng(seed), (rows, 1)
    heavy = rng.standard_t(rng.uniform(1.5, 20, size=column), size=(rows, columns))
    sizes, means = 4.0 ** rng.uniform(-1, 1, size=column), rng.uniform(-1, 1, size=column)
    return np.float32(magnitude * sizes * (heavy + means))


def exact_reach(rows, clip):
    """The documented rules, float64."""
    rows = np.float64(rows)
    return {
        "row_max": np.abs(rows).max(1),
        "percentile": np.quantile(np.abs(rows), 0.99, axis=1),
        "sd": 3.0 * np.sqrt(np.square(rows - rows.mean(1, keepdims=True)).mean(1)),
    }[clip]


def exact_codes(rows, scales, q_min, q_max):
    """The nearest codes in float64, and the weights so close to a tie that float32 may differ."""
    quotient = np.float64(rows) / np.float64(scales)[:, None]
    near_tie = np.abs(np.abs(quotient - np.trunc(quotient)) - 0.5) < 1e-6 * np.abs(quotient)
    return np.clip(np.rint(quotient), q_min, q_max), near_tie


def squared_errors(rows, scales, q_min, q_max):
    """Of each row, float64."""
    codes, _ = exact_codes(rows, scales, q_min, q_max)
    return np.square(np.float64(rows) - np.float64(scales)[:, None] * codes).sum(1)


shapes = {
    "seed": st.integers(0, 10_000),
    "rows": st.integers(1, 30),
    "columns": st.integers(1, 300),
}
clips = st.sampled_from(["row_max", "percentile", "sd"])


@pytest.mark.parametrize(("bits", "codes", "q_min", "q_max"), PUBLISHED)
def test_the_published_ranges(bits, codes, q_min, q_max):
    """A row that exceeds its scale 200 times on both sides uses both ends of the range."""
    assert code_range(bits, codes) == (q_min, q_max)
    tensor = np.float32([[-1000, -1, 0, 1, 1000, *[1] * 1000]])
    export = ExportConfig(codes=codes, clip_percentile=50)
    result = quantize.quantize(tensor, policy(bits, "percentile"), export)
    assert (result.q_min, result.q_max, result.bits) == (q_min, q_max, bits)
    assert result.codes[0, :5].tolist() == [q_min, -q_max, 0, q_max, q_max]
    assert result.codes.dtype == np.int8 and result.scales.dtype == np.float16


def test_a_worked_example():
    """Three bits: q is 3. Halves go to the even code. The last row is too small for its scale."""
    tensor = np.float32(
        [[3.0, 1.4, 1.5, 2.5, -0.6], [0.75, -0.3, 0.0, 0.125, 0.374], [1e-9, 0, 0, 0, 0]]
    )
    result = quantize.quantize(tensor, policy(bits=3), ExportConfig())
    assert result.scales.tolist() == [1.0, 0.25, SMALLEST_NORMAL]
    assert result.codes.tolist() == [[3, 1, 2, 2, -1], [3, -1, 0, 0, 1], [0, 0, 0, 0, 0]]
    expected = [[3.0, 1.0, 2.0, 2.0, -1.0], [0.75, -0.25, 0.0, 0.0, 0.25], [0.0] * 5]
    np.testing.assert_array_equal(dequantize(result), expected)


@given(clip=clips, bits=st.integers(2, 8), floor=st.sampled_from([0.0, 0.2]), **shapes)
def test_scales_are_the_nearest_half_precision_numbers(clip, bits, floor, seed, rows, columns):
    tensor = random_rows(seed, rows, columns)
    export = ExportConfig(clip_percentile=99.0, clip_floor=floor)
    scales = row_scales(tensor, policy(bits, clip), export)
    reach = np.maximum(exact_reach(tensor, clip), floor)
    exact = np.maximum(reach / (2 ** (bits - 1) - 1), SMALLEST_NORMAL)
    assert scales.dtype == np.float16
    # half a float16 step, and float32
    np.testing.assert_array_less(np.abs(scales - exact) / exact, 2.0**-11 + 1e-5)


@given(published=st.sampled_from(PUBLISHED), clip=clips, **shapes)
def test_codes_are_the_nearest_and_errors_at_most_half_a_step(published, clip, seed, rows, columns):
    """Inside the range. A weight beyond it is the whole distance from the last code away."""
    bits, codes, q_min, q_max = published
    tensor = random_rows(seed, rows, columns)
    export = ExportConfig(codes=codes, clip_percentile=99.0)
    result = quantize.quantize(tensor, policy(bits, clip), export)
    expected, near_tie = exact_codes(tensor, result.scales, q_min, q_max)
    np.testing.assert_array_equal(result.codes[~near_tie], expected[~near_tie])
    assert np.abs(result.codes - expected).max() <= 1
    steps = np.float64(result.scales)[:, None]
    beyond = np.maximum(0, np.maximum(tensor - q_max * steps, q_min * steps - tensor))
    errors = np.abs(dequantize(result) - np.float64(tensor))
    assert (errors <= np.maximum(steps / 2 * (1 + 1e-4), beyond * (1 + 1e-9))).all()
    if clip == "row_max":
        assert beyond.max() < steps.max() / 2  # what rounding the scale down may leave


@given(published=st.sampled_from(PUBLISHED), transposed=st.booleans(), **shapes)
def test_weights_on_the_grid_get_their_own_codes_back(published, transposed, seed, rows, columns):
    bits, _, q_min, q_max = published
    rng = np.random.default_rng(seed)
    codes = rng.integers(q_min, q_max + 1, size=(rows, columns)).astype(np.int8)
    scales = np.float16(2.0 ** rng.uniform(-14, 8, size=rows))
    stored = Quantized(codes, scales, bits, q_min, transposed)
    tensor = dequantize(stored)
    assert tensor.dtype == np.float32 and tensor.flags.c_contiguous and tensor.shape == stored.shape
    assert stored.shape == ((columns, rows) if transposed else (rows, columns))
    on_rows = tensor.T if transposed else tensor
    np.testing.assert_array_equal(np.float64(on_rows), np.float64(scales)[:, None] * codes)
    np.testing.assert_array_equal(nearest_codes(on_rows, scales, q_min, q_max), codes)


@pytest.mark.parametrize("clip", ["row_max", "percentile", "search", "sd"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_blocks_and_memory_order_change_nothing(clip, scope):
    tensor = random_rows(3, 37, 211)
    export = ExportConfig(clip_scope=scope, clip_percentile=99.0)
    expected = quantize.quantize(tensor, policy(clip=clip), export)
    for block in (1, 5 * 211, 36 * 211):
        with mock.patch.object(quantize, "BLOCK", block):
            for matrix in (np.ascontiguousarray(tensor.T), tensor.T):
                result = quantize.quantize(matrix, policy(clip=clip, transposed=True), export)
                assert result.transposed and result.shape == matrix.shape
                assert result.codes.flags.c_contiguous
                np.testing.assert_array_equal(result.scales, expected.scales)
                np.testing.assert_array_equal(result.codes, expected.codes)
                np.testing.assert_array_equal(dequantize(result), dequantize(expected).T)


fake_quantize = jax.jit(qat.fake_quantize, static_argnums=(1, 2))


def awkward_matrix(seed, bits, magnitude):
    """Channels whose largest weight puts the scale on a tie, and the others on ties of codes."""
    rng = np.random.default_rng(seed)
    q = 2 ** (bits - 1) - 1
    scales = np.float16(magnitude * 4.0 ** rng.uniform(-1, 1, size=40))
    ties = (np.float32(scales) + np.float32(np.nextafter(scales, np.float16(np.inf)))) / 2
    rows = np.float32(scales)[:, None] * np.float32(rng.integers(-q, q, size=(40, 150)) + 0.5)
    rows = np.nextafter(rows, rng.choice(np.float32([-np.inf, 0, np.inf]), size=rows.shape))
    rows[:, 0] = q * ties
    return rows.T


@pytest.mark.parametrize("codes", ["symmetric", "full"])
@pytest.mark.parametrize(
    ("bits", "floor"), [(2, 0.0), (4, 0.0), (5, 1e-12), (5, 1.0), (6, 0.3), (8, 0.0)]
)
def test_training_imitates_the_exporter_to_the_last_bit(bits, floor, codes):
    """`codes = full` too: by the range row_max, the code -q - 1 is never the nearest."""
    export = ExportConfig(codes=codes, clip_floor=floor)
    for seed, magnitude in enumerate([1e-6, 1e-3, 0.1, 10.0] * 3):
        random = random_rows(seed, 40, 150, magnitude).T
        for matrix in (random, awkward_matrix(seed, bits, magnitude)):
            result = quantize.quantize(matrix, policy(bits, transposed=True), export)
            trained = fake_quantize(jnp.asarray(matrix), bits, floor)
            np.testing.assert_array_equal(dequantize(result), trained)


def searched(tensor, scope, bits=5, codes="symmetric", floor=0.0):
    export = ExportConfig(clip_scope=scope, codes=codes, clip_floor=floor)
    return row_scales(tensor, policy(bits, "search"), export)


def candidate_scales(tensor, bits):
    """The scales of each single percentile, [candidates, rows]."""
    export = [ExportConfig(clip_percentile=percent) for percent in (99.9, 99.95, 99.99, 100.0)]
    return np.stack([row_scales(tensor, policy(bits, "percentile"), one) for one in export])


@given(
    published=st.sampled_from(PUBLISHED),
    seed=st.integers(0, 10_000),
    columns=st.integers(500, 3000),
)
def test_search_takes_the_percentile_of_least_squared_error(published, seed, columns):
    bits, codes, q_min, q_max = published
    tensor = random_rows(seed, 7, columns)
    candidates = candidate_scales(tensor, bits)
    errors = np.stack([squared_errors(tensor, scales, q_min, q_max) for scales in candidates])

    by_row = searched(tensor, "row", bits, codes)
    assert all(scale in candidates[:, row] for row, scale in enumerate(by_row))
    by_row_errors = squared_errors(tensor, by_row, q_min, q_max)
    np.testing.assert_allclose(by_row_errors, errors.min(0), rtol=1e-4)

    by_matrix = searched(tensor, "matrix", bits, codes)
    assert any(np.array_equal(by_matrix, scales) for scales in candidates)
    by_matrix_error = squared_errors(tensor, by_matrix, q_min, q_max).sum()
    np.testing.assert_allclose(by_matrix_error, errors.sum(1).min(), rtol=1e-4)
    assert by_row_errors.sum() <= by_matrix_error * (1 + 1e-4)


def test_search_is_made_with_the_floor():
    scales = searched(random_rows(1, 5, 700, magnitude=1e-4), "row", floor=1.0)
    np.testing.assert_array_equal(scales, np.full(5, np.float16(1 / 15)))


@given(fraction=st.floats(0, 0.999), values=st.integers(1, 50), **shapes)
def test_prune_sets_the_smallest_to_zero(fraction, values, seed, rows, columns):
    """Among ties, a stable sort says which go."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 1], size=(rows, columns))
    tensor = np.float32(rng.integers(1, values + 1, size=(rows, columns)) * signs)
    before, expected = tensor.copy(), tensor.copy().ravel()
    expected[np.argsort(np.abs(expected), kind="stable")[: int(fraction * tensor.size)]] = 0
    result = prune(tensor, fraction)
    np.testing.assert_array_equal(result, expected.reshape(tensor.shape))
    np.testing.assert_array_equal(tensor, before)


@pytest.mark.parametrize("clip", ["row_max", "percentile", "search", "sd"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_one_error(clip, value):
    """Also where the rule would clip them away."""
    matrix = np.ones((3000, 4), np.float32)
    matrix[2000, 3] = value
    with pytest.raises(UserError, match=re.escape(f"row 3, column 2000 of its grid is {value}")):
        quantize.quantize(matrix, policy(clip=clip, transposed=True), ExportConfig())


@pytest.mark.parametrize("clip", ["row_max", "percentile", "search", "sd"])
def test_a_range_beyond_half_precision_is_one_error(clip):
    """The largest float16 is 65504. Numbers from 65520 on round to infinity."""
    tensor = np.full((2, 10), 1.0, np.float32)
    tensor[1, ::2] = -1.0
    fits, too_far = np.float32(15 * 65519), np.float32(15 * 65521)
    assert row_scales(tensor * fits, policy(clip=clip, sd=1.0), ExportConfig())[1] == 65504
    with pytest.raises(UserError, match=r"range 9\.828e\+05, but 5 bits end at 15 · 65504"):
        row_scales(tensor * too_far, policy(clip=clip, sd=1.0), ExportConfig())
