"""The kernels that sum signed atoms, in interpret mode, at widths from 64 to 2048."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from sngpt_kernels.cayley import dictionary, folding, pallas_backward, pallas_lookup, pallas_triton
from sngpt_kernels.cayley.pallas_decode import Config
from sngpt_kernels.cayley.xla import ACTIVE_BIT

from tests.kernels.cayley_checks import EPS, check_close


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 18), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_words_hold_the_parities(n, count, seed):
    rng = np.random.default_rng(seed)
    masks, ids = rng.integers(0, 2**20, 32 * count), rng.integers(0, 2**n, 5)
    table = folding.sign_words(masks, n)
    assert table.shape == (-(-n // 5), 32, count) and table.dtype == np.int32
    words = np.zeros((5, count), np.int32)
    for digit, rows in enumerate(table):
        words ^= rows[ids >> 5 * digit & 31]
    # bit i of word j is that of position i · count + j
    odd = np.bitwise_count(ids[:, None] & masks) & 1
    np.testing.assert_array_equal(
        (words[:, None] >> np.arange(32)[:, None] & 1).reshape(5, -1), odd
    )


def combine(saved, c, d, features, trip):
    def kernel(saved_ref, c_ref, table_ref, out_ref):
        row = pl.program_id(0)
        sums = pallas_lookup.combine(row, c_ref, saved_ref, table_ref, trip, True)
        pallas_lookup.store(out_ref, row, tuple(a * np.float32(d**-0.5) for a in sums))

    out = jax.ShapeDtypeStruct((len(saved), d), jnp.float32)
    return pl.pallas_call(kernel, out_shape=out, grid=(len(saved),), interpret=True)(
        saved, c, pallas_lookup.table(d, features)
    )


def make_code(d, features, rows, active):
    """Ids, coefficients, half of them 0, and ids with the bit of c > 0."""
    rng = np.random.default_rng(d)
    ids = np.stack([rng.choice(features, active, replace=False) for _ in range(rows)])
    ids = ids.astype(np.int32)
    c = np.maximum(rng.standard_normal(ids.shape), 0).astype(np.float32)
    return ids, c, ids | (c > 0).astype(np.int32) << ACTIVE_BIT


CONFIG = dataclasses.replace(Config.heuristic(), bias_lanes=32)
SIZES = pytest.mark.parametrize(
    ("d", "features", "rows"),
    [(64, 2**11, 37), (512, 2**17, 7), (2048, 2**17, 3), (1024, 2**10, 1)],
)


@SIZES
def test_decodes(d, features, rows):
    """Σ c v."""
    ids, c, saved = make_code(d, features, rows, 13)
    expected = np.einsum("na,nad->nd", c, dictionary.atoms(ids, d))
    for trip in (pallas_backward.TRIP, pallas_triton.TRIP):
        difference = np.abs(combine(saved, c, d, features, trip) - expected)
        print(f"d {d}: |difference| max {difference.max():.1e}, mean {difference.mean():.1e}")
        assert difference.max() <= 13 * EPS * c.sum(1).max() / np.sqrt(d)


def backward(dx_hat, saved, inverse_std):
    return pallas_backward.backward(True, dx_hat, saved, inverse_std)


@pytest.mark.parametrize(
    ("d", "features", "rows", "active"),
    [(64, 2**11, 37, 13), (512, 2**17, 7, 35), (2048, 2**17, 3, 16), (1024, 2**10, 1, 1)],
)
def test_gradients(d, features, rows, active):
    """g = ⟨v, dx_hat⟩ where c > 0, and Σ g v / std."""
    rng = np.random.default_rng(7)
    ids, c, saved = make_code(d, features, rows, active)
    dx_hat = rng.standard_normal((rows, d)).astype(np.float32)
    inverse_std = rng.uniform(0.5, 1000, features).astype(np.float32)
    dx, g = backward(dx_hat, saved, inverse_std)
    atoms = dictionary.atoms(ids, d)
    expected_g = np.einsum("nad,nd->na", atoms, dx_hat.astype(np.float64)) * (c > 0)
    expected_dx = np.einsum("na,nad->nd", expected_g * inverse_std[ids], atoms)
    check_close("g", g, expected_g)
    check_close("dx", dx, expected_dx)


def run_warp(asm, operands):
    """Runs PTX of one warp: `operands` are arrays of 32 lanes, to which the results are written."""
    values = {f"${i}": a for i, a in enumerate(operands)}
    values["%tid.x"] = np.arange(32, dtype=np.uint32)
    functions = {
        "mov": lambda a: a,
        "shl": lambda a, by: a << np.uint32(by),
        "and": lambda a, mask: a & np.uint32(int(mask, 16)),
        "or": lambda a, mask: a | np.uint32(int(mask, 16)),
        "mul": lambda a, b: (a.view(np.float32) * b.view(np.float32)).view(np.uint32),
        "fma": lambda a, b, c: (a.view(np.float32) * b.view(np.float32) + c.view(np.float32)).view(
            np.uint32
        ),
        "shfl": lambda a, lane, *_: a[lane & 31],
    }
    for line in asm.strip("{ }").split(";"):
        name, *places = line.replace(",", " ").split() or [".reg"]
        if name != ".reg":
            result = functions[name.split(".")[0]](*(values.get(at, at) for at in places[1:]))
            values.setdefault(places[0], np.zeros(32, np.uint32))[:] = result


@pytest.mark.parametrize(("count", "pack"), [(5, 4), (4, 8), (2, 1)])
def test_the_lookups_machine_code_does_what_interpretation_does(count, pack):
    """As a simulated warp runs it, which is all that can be checked without a GPU."""
    rng = np.random.default_rng(pack)
    values = rng.standard_normal(count).astype(np.float32)
    index = rng.integers(-(2**31), 2**31, (pack, 32)).astype(np.int32)
    results = [np.zeros(32, np.uint32) for _ in range(pack)]
    copies = [np.full(32, value).view(np.uint32) for value in values for _ in range(pack)]
    run_warp(
        pallas_lookup.lookup_asm(len(values), pack), [*results, *copies, *index.view(np.uint32)]
    )
    expected = pallas_lookup.signed_sums(list(values), jnp.asarray(index), True)
    np.testing.assert_array_equal(np.stack(results).view(np.float32), expected)


def test_transposed_words_hold_the_bits_of_four():
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (4, 5)).astype(np.int32)
    nibbles = np.stack(
        [a >> 4 * q & 15 for q in range(8) for a in pallas_lookup.transposed(list(words))]
    )
    bits = words[..., None] >> np.arange(32) & 1
    np.testing.assert_array_equal(nibbles.T, (bits << np.arange(4)[:, None, None]).sum(0))


def test_bfloat16_gradients_are_rounded_once():
    saved = make_code(64, 2**11, 5, 13)[-1]
    dx_hat = jnp.asarray(np.random.default_rng(7).standard_normal((5, 64)), jnp.bfloat16)
    ones = np.ones(2**11, np.float32)
    dx, g = backward(dx_hat, saved, ones)
    wide, wide_g = backward(dx_hat.astype(jnp.float32), saved, ones)
    assert dx.dtype == jnp.bfloat16 and g.dtype == jnp.float32
    np.testing.assert_array_equal(g, wide_g)
    np.testing.assert_array_equal(dx, wide.astype(jnp.bfloat16))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 17, 600]))
def test_bias_gradient_sums_by_feature(seed, distinct):
    """Whole numbers add up exactly. The features that are selected are `distinct`."""
    rng = np.random.default_rng(seed)
    features = rng.choice(600, distinct, replace=False).astype(np.int32)
    ids = features[rng.integers(0, distinct, (41, 12))]
    g = rng.integers(-9, 10, ids.shape).astype(np.float32)
    sums = bias_gradient(ids | rng.integers(0, 2, ids.shape, np.int32) << ACTIVE_BIT, g)
    np.testing.assert_array_equal(sums, np.bincount(ids.reshape(-1), g.reshape(-1), minlength=600))


@jax.jit
def bias_gradient(saved, g):
    return pallas_backward.bias_gradient(CONFIG, True, saved, g, 600)


def test_bias_gradient_keeps_to_one_order():
    """Other features do not change in which order the numbers of a feature are added."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (41, 12)).astype(np.int32)
    g = rng.standard_normal((41, 12)).astype(np.float32)
    sums = bias_gradient(ids, g)
    others = np.where(ids % 2 == 0, ids, 300 + ids)  # the odd features are other ones
    np.testing.assert_array_equal(bias_gradient(others, g)[:300:2], sums[:300:2])
