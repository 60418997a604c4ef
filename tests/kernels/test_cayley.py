"""encode_decode: the same tests for all implementations, including the float64 reference.

The Pallas Triton kernels run in interpret mode. Most tests take inputs [37, 64], so that they share
compiled programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sngpt_kernels.cayley import dictionary, reference
from sngpt_kernels.cayley.api import encode_decode
from sngpt_kernels.cayley.dictionary import Scheme

from tests.kernels.cayley_checks import (
    CALLS,
    D64,
    D128,
    D1024,
    D2048,
    KINDS,
    QUICKLY,
    RAW64,
    S64,
    SHALLOW,
    check,
    check_close,
    make_inputs,
    split,
    value_and_gradients,
)

BOTH = pytest.mark.parametrize("implementation", CALLS)
SCHEMES = pytest.mark.parametrize("scheme", [S64, RAW64], ids=["standardized", "raw"])


@pytest.mark.parametrize("implementation", ["reference", *CALLS])
class TestEveryImplementation:
    """Against algebra that holds for all scores."""

    def test_most_tied_inputs_take_the_lowest_ids(self, implementation):
        """Every score is 0: the lowest ids of level 0 win, and of each set of candidates."""
        inputs = {name: np.zeros_like(a) for name, a in make_inputs("random", D64, 37).items()}
        inputs["std"] += 1
        x_hat, ids, (dx, *_) = value_and_gradients(implementation, S64, inputs)
        assert not x_hat.any() and not dx.any()
        selected = set(range(4))
        for level, mine in enumerate(split(ids, D64)):
            if level:
                steps = reference.child_steps(D64, level, "spread")
                candidates = {f ^ u for f in selected for u in steps}
                selected = set(sorted(candidates)[: D64[level][1]])
            assert all(set(row.tolist()) == selected for row in mine)

    @SCHEMES
    def test_is_a_sum_of_the_atoms_it_names(self, implementation, scheme):
        """x_hat is linear in the scores of the selected features. dx is the transposed map."""
        inputs = make_inputs("random", D64, 37)
        x_hat, ids, (dx, _, _, dbias) = value_and_gradients(implementation, scheme, inputs)
        x, mean, std, bias, cotangent = (a.astype(np.float64) for a in inputs.values())
        atoms, ids = dictionary.atoms(ids, 64), np.asarray(ids)
        divisor = std[ids] if scheme.forward_standardized else np.ones(ids.shape)
        c = np.maximum(np.einsum("nad,nd->na", atoms, x - mean) / divisor + bias[ids], 0)
        g = np.einsum("nad,nd->na", atoms, cotangent) * (c > 0)
        check_close("x_hat", x_hat, np.einsum("na,nad->nd", c, atoms))
        check_close("dx", dx, np.einsum("na,nad->nd", g / divisor, atoms))
        sums = np.bincount(ids.reshape(-1), g.reshape(-1), minlength=len(bias))
        check_close("dbias", dbias, sums)


@BOTH
@pytest.mark.parametrize("scheme", [S64, RAW64, Scheme(D64, generators="prefix")])
def test_matches_the_reference(implementation, scheme):
    for kind in KINDS:
        check(implementation, scheme, kind, 37)


@BOTH
def test_several_blocks_of_parents_match_the_reference(implementation):
    """No k is a power of two, and 19 parents take two blocks."""
    for kind in ("random", "tied"):
        check(implementation, Scheme(((6, 5, 0), (9, 19, 32), (11, 23, 16))), kind, 6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("implementation", "levels", "generators", "tokens"),
    [
        ("xla", D128, "spread", 65),
        ("pallas_triton", D128, "spread", 65),
        ("xla", D1024, "spread", 5),
        ("xla", D1024, "prefix", 5),
        ("pallas_triton", D1024, "spread", 5),
        ("pallas_triton", D2048, "spread", 2),
    ],
)
def test_matches_the_reference_at_the_recipes_sizes(implementation, levels, generators, tokens):
    check(implementation, Scheme(levels, generators=generators), "random", tokens)


@BOTH
@SCHEMES
def test_input_that_is_not_finite(implementation, scheme):
    """Its output is not finite, its ids are distinct children, and other tokens do not change."""
    inputs = make_inputs("random", D64, 37)
    expected_x_hat, expected_ids, _ = value_and_gradients(implementation, scheme, inputs)
    others = np.arange(37) != 2
    for value in (np.nan, np.inf, -np.inf, 3e38):
        for how_many in (1, 64):
            x = inputs["x"].copy()
            x[2, :how_many] = value
            x_hat, ids, _ = value_and_gradients(implementation, scheme, inputs | {"x": x})
            if value != 3e38:  # finite, although some of its scores are not
                assert not np.isfinite(x_hat[2]).any()
            candidates, selected = set(range(64)), set()
            for level, mine in enumerate(split(ids[2], D64)):
                if level:
                    steps = reference.child_steps(D64, level, "spread")
                    candidates = {f ^ u for f in selected for u in steps}
                selected = set(mine.tolist())
                assert len(selected) == D64[level][1] and selected <= candidates
            np.testing.assert_array_equal(x_hat[others], expected_x_hat[others])
            np.testing.assert_array_equal(ids[others], expected_ids[others])


@BOTH
@SCHEMES
def test_not_finite_statistics_and_bias_reach_the_output(implementation, scheme):
    inputs = make_inputs("random", D64, 37)
    for name, which in (("std", 5), ("bias", 5), ("mean", slice(None))):
        array = inputs[name].copy()
        array[which] = np.nan
        x_hat, ids, _ = value_and_gradients(implementation, scheme, inputs | {name: array})
        assert not np.isfinite(x_hat).all(1).any() and ids.min() >= 0 and ids.max() < 2048


@BOTH
def test_bfloat16_is_scored_exactly(implementation):
    """The sets are those of the same numbers in float32. Outputs are rounded once."""
    inputs = make_inputs("random", D64, 37)
    low = {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ("x", "cotangent")}
    wide = {name: np.asarray(a, np.float32) for name, a in low.items()}
    x_hat, ids, (dx, _, _, dbias) = value_and_gradients(implementation, S64, inputs | low)
    wide_x_hat, wide_ids, (wide_dx, _, _, wide_dbias) = value_and_gradients(
        implementation, S64, inputs | wide
    )
    np.testing.assert_array_equal(np.sort(ids), np.sort(wide_ids))
    assert x_hat.dtype == dx.dtype == jnp.bfloat16 and dbias.dtype == jnp.float32
    np.testing.assert_allclose(x_hat.astype(jnp.float32), wide_x_hat, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dx.astype(jnp.float32), wide_dx, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dbias, wide_dbias, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "shape"),
    [("xla", ()), *((name, shape) for name in CALLS for shape in ((2, 0), (2, 1, 7)))],
)
def test_leading_shapes(implementation, shape):
    """Of one level, which is a quick program."""
    scheme = Scheme(D64[:1])
    x, mean, std, bias, _ = make_inputs("random", scheme.levels, 21).values()
    tokens = int(np.prod(shape))
    expected = jax.jit(lambda x: CALLS["xla"](x, mean, std, bias, scheme))(x)

    def loss(x, bias):
        x_hat, ids = CALLS[implementation](x, mean, std, bias, scheme)
        return jnp.sum(x_hat), (x_hat, ids)

    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICKLY)
    (dx, dbias), (x_hat, ids) = program(x[:tokens].reshape(*shape, 64), bias)
    assert x_hat.shape == dx.shape == (*shape, 64)
    assert ids.shape == (*shape, 4) and ids.dtype == jnp.int32
    assert dbias.shape == (64,) and dbias.any() == bool(tokens)
    np.testing.assert_allclose(x_hat.reshape(tokens, 64), expected[0][:tokens], atol=1e-5)
    np.testing.assert_array_equal(np.sort(ids.reshape(tokens, 4)), np.sort(expected[1][:tokens]))


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("pallas_triton", marks=pytest.mark.full)]
)
def test_vmap_checkpoint_and_shard_map(implementation):
    inputs, scheme = make_inputs("random", SHALLOW, 48), Scheme(SHALLOW)
    x_hat, ids, (dx, _, _, dbias) = value_and_gradients("xla", scheme, inputs)
    x, mean, std, bias, cotangent = inputs.values()

    def loss(x, bias, cotangent):
        x_hat, ids = CALLS[implementation](x, mean, std, bias, scheme)
        return jnp.sum(x_hat * cotangent), (x_hat, ids)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    again = jax.grad(jax.checkpoint(loss), argnums=(0, 1), has_aux=True)
    rows = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x, bias, cotangent):
        (dx, dbias), aux = gradient(x, bias, cotangent)
        return (dx, jax.lax.psum(dbias, "data")), aux

    in_specs, out_specs = (rows, PartitionSpec(), rows), ((rows, PartitionSpec()), rows)
    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

    def batched(x, bias, cotangent):
        batches = (a.reshape(6, 8, 64) for a in (x, cotangent))
        (dx, dbias), aux = jax.vmap(gradient, (0, None, 0))(next(batches), bias, next(batches))
        dx, *aux = (a.reshape(48, -1) for a in (dx, *aux))
        return (dx, dbias.sum(0)), aux

    for function in (batched, again, sharded):
        program = jax.jit(function, compiler_options=QUICKLY)
        (mine_dx, mine_dbias), (mine_x_hat, mine_ids) = program(x, bias, cotangent)
        np.testing.assert_array_equal(np.sort(mine_ids), np.sort(ids))
        for mine, theirs in ((mine_x_hat, x_hat), (mine_dx, dx), (mine_dbias, dbias)):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


@BOTH
@pytest.mark.parametrize("forward_standardized", [True, False])
def test_backward_pass_keeps_four_bytes_per_selected_feature(implementation, forward_standardized):
    """448 bytes per token at 16 + 32 + 64, beside arrays of the dictionary's size."""
    tokens, active, features = 7, 112, 2**17
    scheme = Scheme(D1024, forward_standardized)

    def residuals(x, mean, std, bias):
        def f(x, bias):
            return CALLS[implementation](x, mean, std, bias, scheme)

        return jax.tree.leaves(jax.vjp(f, x, bias, has_aux=True)[1])

    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = [float32(shape) for shape in ((tokens, 1024), (1024,), (features,), (features,))]
    saved = jax.eval_shape(residuals, *inputs)
    shapes = [(leaf.dtype, leaf.shape) for leaf in saved if leaf.shape != (features,)]
    assert shapes == [(jnp.int32, (tokens, active))]
    assert len(saved) == 1 + forward_standardized


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": jnp.zeros((3, 64), jnp.float16)}, "x is float16 [3, 64]; expected bfloat16 or"),
        ({"x": jnp.zeros((3, 64), jnp.int32)}, "x is int32 [3, 64]"),
        ({"x": jnp.zeros(())}, "x is float32 []"),
        ({"x": jnp.zeros((3, 32))}, "with width 32 it must be log2(32) = 5"),
        ({"mean": jnp.zeros(32)}, "mean is float32 [32]; expected float32 [64]"),
        ({"std": jnp.zeros((2048, 1))}, "std is float32 [2048, 1]; expected float32 [2048]"),
        ({"bias": jnp.zeros(2048, jnp.bfloat16)}, "bias is bfloat16 [2048]; expected float32"),
        ({"implementation": "cuda"}, "is 'cuda'; expected one of xla, pallas_triton, or None"),
        ({"generators": "random"}, "generators is 'random'"),
        ({"levels": [[6, 4, 0]]}, "levels is [[6, 4, 0]]; expected a tuple of tuples of three"),
        ({"levels": (6, 4, 0)}, "levels is (6, 4, 0); expected"),
        ({"levels": ((6.0, 4, 0),)}, "levels is ((6.0, 4, 0),); expected"),
    ],
)
def test_wrong_arguments(change, complaint):
    arguments = {
        "x": jnp.zeros((3, 64)),
        "mean": jnp.zeros(64),
        "std": jnp.ones(2048),
        "bias": jnp.zeros(2048),
        "levels": D64,
    }
    with pytest.raises(ValueError) as error:
        encode_decode(**(arguments | change))
    assert complaint in str(error.value) and "\n" not in str(error.value)
