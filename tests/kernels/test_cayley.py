"""encode_decode: the same tests for all implementations, the float64 reference among them.

The Pallas Triton kernels run in interpretation, as few compiled programs as can be: most tests
take the shapes [37, 64].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sngpt_kernels.cayley import dictionary, reference
from sngpt_kernels.cayley.api import encode_decode

from tests.kernels.cayley_checks import (
    D64,
    D128,
    D1024,
    EPS,
    KINDS,
    QUICKLY,
    SHALLOW,
    call,
    check,
    make_inputs,
    split,
    value_and_gradients,
)

KERNELS = ("xla", "pallas_triton")
BOTH = pytest.mark.parametrize("implementation", KERNELS)


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
class TestEveryImplementation:
    """Against algebra: what must hold whatever the scores are."""

    def test_most_tied_inputs_take_the_lowest_ids(self, implementation: str) -> None:
        """Everything scores 0: the lowest ids of level 0, and of each set of candidates."""
        inputs = {name: np.zeros_like(a) for name, a in make_inputs("random", D64, 37).items()}
        inputs["std"] += 1
        x_hat, ids, (dx, *_) = value_and_gradients(
            **inputs, implementation=implementation, levels=D64
        )
        assert not x_hat.any() and not dx.any()
        selected = set(range(4))
        for level, mine in enumerate(split(ids, D64)):
            if level:
                candidates = {
                    f ^ u for f in selected for u in reference.child_steps(D64, level, "spread")
                }
                selected = set(sorted(candidates)[: D64[level][1]])
            assert all(set(row.tolist()) == selected for row in mine)

    @pytest.mark.parametrize("forward_standardized", [True, False])
    def test_is_a_sum_of_the_atoms_it_names(
        self, implementation: str, forward_standardized: bool
    ) -> None:
        """x_hat is linear in the scores of the selected features, and the gradient is the
        transposed map.
        """
        inputs = make_inputs("random", D64, 37)
        static = {"levels": D64, "forward_standardized": forward_standardized}
        x_hat, ids, (dx, _, _, dbias) = value_and_gradients(
            **inputs, implementation=implementation, **static
        )
        x, mean, std, bias, cotangent = (inputs[name].astype(np.float64) for name in inputs)
        atoms, ids = dictionary.atoms(ids, 64), np.asarray(ids)
        divisor = std[ids] if forward_standardized else np.ones(ids.shape)
        c = np.maximum(np.einsum("nad,nd->na", atoms, x - mean) / divisor + bias[ids], 0)
        g = np.einsum("nad,nd->na", atoms, cotangent) * (c > 0)
        expected_dbias = np.bincount(ids.reshape(-1), g.reshape(-1), minlength=len(bias))
        expected = (
            np.einsum("na,nad->nd", c, atoms),
            np.einsum("na,nad->nd", g / divisor, atoms),
            expected_dbias,
        )
        for mine, theirs in zip((x_hat, dx, dbias), expected, strict=True):
            difference = np.abs(mine - theirs)
            print(
                f"|difference| max {difference.max():.1e}, mean {difference.mean():.1e} of"
                f" {np.abs(theirs).max():.1e}"
            )
            assert difference.max() <= 20 * EPS * np.abs(theirs).max()


@BOTH
class TestAgainstTheReference:
    """The same sets, the same sums, for inputs of every kind."""

    @pytest.mark.parametrize("forward_standardized", [True, False])
    def test_matches_the_reference(self, implementation: str, forward_standardized: bool) -> None:
        for kind in KINDS:
            check(implementation, kind, D64, 37, forward_standardized=forward_standardized)

    def test_prefix_children_match_the_reference(self, implementation: str) -> None:
        for kind in KINDS:
            check(implementation, kind, D64, 37, generators="prefix")


@BOTH
@pytest.mark.slow
def test_matches_reference_at_the_quickstart_size(implementation: str) -> None:
    check(implementation, "random", D128, 65)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "generators"),
    [("xla", "spread"), ("xla", "prefix"), ("pallas_triton", "spread")],
)
def test_matches_reference_at_1024(implementation: str, generators: str) -> None:
    check(implementation, "random", D1024, 5, generators=generators)


@BOTH
@pytest.mark.parametrize("forward_standardized", [True, False])
def test_input_that_is_not_finite(implementation: str, forward_standardized: bool) -> None:
    """Its output is not finite either, its ids are distinct children of those before, and other
    tokens are as they were.
    """
    inputs = make_inputs("random", D64, 37)
    static = {
        "implementation": implementation,
        "levels": D64,
        "forward_standardized": forward_standardized,
    }
    expected_x_hat, expected_ids, _ = value_and_gradients(**inputs, **static)
    others = np.arange(37) != 2
    for value in (np.nan, np.inf, -np.inf, 3e38):
        for how_many in (1, 64):
            x = inputs["x"].copy()
            x[2, :how_many] = value
            x_hat, ids, _ = value_and_gradients(**(inputs | {"x": x}), **static)
            if value != 3e38:  # finite, its scores are not all
                assert not np.isfinite(x_hat[2]).any()
            candidates, selected = set(range(64)), set()
            for level, mine in enumerate(split(ids[2], D64)):
                if level:
                    candidates = {
                        f ^ u for f in selected for u in reference.child_steps(D64, level, "spread")
                    }
                selected = set(mine.tolist())
                assert len(selected) == D64[level][1] and selected <= candidates
            np.testing.assert_array_equal(x_hat[others], expected_x_hat[others])
            np.testing.assert_array_equal(ids[others], expected_ids[others])


@BOTH
@pytest.mark.parametrize("forward_standardized", [True, False])
def test_not_finite_statistics_and_bias_reach_the_output(
    implementation: str, forward_standardized: bool
) -> None:
    inputs = make_inputs("random", D64, 37)
    static = {
        "implementation": implementation,
        "levels": D64,
        "forward_standardized": forward_standardized,
    }
    nan = np.float32(np.nan)
    fifth = np.arange(2048) == 5
    changes = {
        "mean": inputs["mean"] * nan,
        **{name: np.where(fifth, nan, inputs[name]) for name in ("std", "bias")},
    }
    for name, array in changes.items():
        x_hat, ids, _ = value_and_gradients(**(inputs | {name: array}), **static)
        assert not np.isfinite(x_hat).all(1).any() and ids.min() >= 0 and ids.max() < 2048


@BOTH
def test_bfloat16_is_scored_exactly(implementation: str) -> None:
    """The same sets as those of the same numbers in float32; outputs are rounded once."""
    inputs = make_inputs("random", D64, 37)
    static = {"implementation": implementation, "levels": D64, "forward_standardized": True}
    x, cotangent = (jnp.asarray(inputs.pop(name), jnp.bfloat16) for name in ("x", "cotangent"))
    x_hat, ids, (dx, _, _, dbias) = value_and_gradients(
        x=x, cotangent=cotangent, **inputs, **static
    )
    x, cotangent = (np.asarray(a, np.float32) for a in (x, cotangent))
    wide, wide_ids, (wide_dx, _, _, wide_dbias) = value_and_gradients(
        x=x, cotangent=cotangent, **inputs, **static
    )
    np.testing.assert_array_equal(np.sort(ids), np.sort(wide_ids))
    assert x_hat.dtype == dx.dtype == jnp.bfloat16 and dbias.dtype == jnp.float32
    np.testing.assert_allclose(x_hat.astype(jnp.float32), wide, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dx.astype(jnp.float32), wide_dx, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dbias, wide_dbias, atol=1e-5)


@BOTH
@pytest.mark.parametrize("shape", [(), (2, 0), (2, 1, 7)])
def test_leading_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    x, mean, std, bias, _ = make_inputs("random", SHALLOW, 21).values()
    tokens = int(np.prod(shape))
    expected = jax.jit(lambda x: call("xla", x, mean, std, bias, SHALLOW))(x)

    def loss(x: jax.Array, bias: jax.Array) -> Any:
        x_hat, ids = call(implementation, x, mean, std, bias, SHALLOW)
        return jnp.sum(x_hat), (x_hat, ids)

    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICKLY)
    (dx, dbias), (x_hat, ids) = program(x[:tokens].reshape(*shape, 64), bias)
    assert (
        x_hat.shape == dx.shape == (*shape, 64)
        and ids.shape == (*shape, 12)
        and ids.dtype == jnp.int32
    )
    assert dbias.shape == (512,) and dbias.any() == bool(tokens)
    np.testing.assert_allclose(x_hat.reshape(tokens, 64), expected[0][:tokens], atol=1e-5)
    np.testing.assert_array_equal(np.sort(ids.reshape(tokens, 12)), np.sort(expected[1][:tokens]))


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("pallas_triton", marks=pytest.mark.slow)]
)
def test_vmap_checkpoint_and_shard_map(implementation: str) -> None:
    inputs = make_inputs("random", SHALLOW, 48)
    x_hat, ids, (dx, _, _, dbias) = value_and_gradients(**inputs, levels=SHALLOW)
    x, mean, std, bias, cotangent = inputs.values()

    def loss(x: jax.Array, bias: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, Any]:
        x_hat, ids = call(implementation, x, mean, std, bias, SHALLOW)
        return jnp.sum(x_hat * cotangent), (x_hat, ids)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    again = jax.grad(jax.checkpoint(loss), argnums=(0, 1), has_aux=True)
    rows = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x: jax.Array, bias: jax.Array, cotangent: jax.Array) -> Any:
        (dx, dbias), aux = gradient(x, bias, cotangent)
        return (dx, jax.lax.psum(dbias, "data")), aux

    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(), rows),
        out_specs=((rows, PartitionSpec()), (rows, rows)),
        check_vma=False,
    )
    batched = jax.vmap(gradient, in_axes=(0, None, 0))
    in_rows = (a.reshape(6, 8, 64) for a in (x, cotangent))
    (batched_dx, batched_dbias), (batched_x_hat, batched_ids) = jax.jit(
        batched, compiler_options=QUICKLY
    )(next(in_rows), bias, next(in_rows))
    results = [
        (
            (batched_dx.reshape(48, 64), batched_dbias.sum(0)),
            (batched_x_hat.reshape(48, 64), batched_ids.reshape(48, 12)),
        ),
        jax.jit(again, compiler_options=QUICKLY)(x, bias, cotangent),
        jax.jit(sharded, compiler_options=QUICKLY)(x, bias, cotangent),
    ]
    for (mine_dx, mine_dbias), (mine_x_hat, mine_ids) in results:
        np.testing.assert_array_equal(np.sort(mine_ids), np.sort(ids))
        for mine, theirs in ((mine_x_hat, x_hat), (mine_dx, dx), (mine_dbias, dbias)):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


@BOTH
@pytest.mark.parametrize("forward_standardized", [True, False])
def test_backward_pass_keeps_four_bytes_a_selected_feature(
    implementation: str, forward_standardized: bool
) -> None:
    """448 bytes a token at 16 + 32 + 64; beside them only what is as large as the dictionary."""
    tokens, active, features = 7, 112, 2**17

    def residuals(x: Any, mean: Any, std: Any, bias: Any) -> list[Any]:
        def f(x: Any, bias: Any) -> Any:
            return call(
                implementation, x, mean, std, bias, D1024, forward_standardized=forward_standardized
            )

        return jax.tree.leaves(jax.vjp(f, x, bias, has_aux=True)[1])

    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    saved = jax.eval_shape(
        residuals,
        float32((tokens, 1024)),
        float32((1024,)),
        float32((features,)),
        float32((features,)),
    )
    shapes = [(leaf.dtype, leaf.shape) for leaf in saved if leaf.shape != (features,)]
    assert shapes == [(jnp.int32, (tokens, active))]
    assert len(saved) == 1 + forward_standardized


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"x": jnp.zeros((3, 64), jnp.float16)},
            "x is float16 [3, 64]; expected bfloat16 or float32",
        ),
        ({"x": jnp.zeros((3, 64), jnp.int32)}, "x is int32 [3, 64]"),
        ({"x": jnp.zeros(())}, "x is float32 []"),
        ({"x": jnp.zeros((3, 32))}, "with width 32 it must be log2(32) = 5"),
        ({"mean": jnp.zeros(32)}, "mean is float32 [32]; expected float32 [64]"),
        ({"std": jnp.zeros((2048, 1))}, "std is float32 [2048, 1]; expected float32 [2048]"),
        (
            {"bias": jnp.zeros(2048, jnp.bfloat16)},
            "bias is bfloat16 [2048]; expected float32 [2048]",
        ),
        (
            {"implementation": "cuda"},
            "implementation is 'cuda'; expected xla or pallas_triton, or None",
        ),
        ({"generators": "random"}, "generators is 'random'"),
        (
            {"levels": [[6, 4, 0]]},
            "levels is [[6, 4, 0]]; expected a tuple of tuples of three integers",
        ),
        ({"levels": (6, 4, 0)}, "levels is (6, 4, 0); expected"),
        ({"levels": ((6.0, 4, 0),)}, "levels is ((6.0, 4, 0),); expected"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], complaint: str) -> None:
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
