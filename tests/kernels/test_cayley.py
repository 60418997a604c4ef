"""encode_decode against the float64 reference: values, gradients, selected sets, and the transformations of jax."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from kernels import cayley
from kernels.cayley import api, dictionary, encode_decode, reference, xla

D64 = ((6, 4, 0), (9, 8, 32), (11, 12, 16))
D128 = ((7, 8, 0), (10, 16, 32), (12, 32, 32))
D1024 = ((10, 16, 0), (15, 32, 256), (17, 64, 256))
SHALLOW = D64[:2]
KINDS = ("random", "low rank", "constant", "zero", "huge", "tied", "small deviations")
EPS = np.finfo(np.float32).eps


def make_inputs(kind: str, levels: dictionary.Levels, tokens: int) -> dict[str, np.ndarray]:
    """x, mean, std, bias and a cotangent; statistics and biases are those of a model under way, trivial only for ties."""
    rng = np.random.default_rng(len(kind))
    d, features = 2 ** levels[0][0], 2 ** levels[-1][0]
    normal = rng.standard_normal((tokens, d))
    x = {
        "random": normal,
        "low rank": normal[:, :3] @ rng.standard_normal((3, d)),
        "constant": np.full((tokens, d), 0.7),
        "zero": np.zeros((tokens, d)),
        "huge": 1e4 * normal,
        "tied": rng.integers(-1, 2, (tokens, d)),
        "small deviations": normal,
    }[kind]
    tied = kind == "tied"  # whole numbers and no statistics: many scores are exactly equal, in float32 as in float64
    std = rng.uniform(0.3, 2, features)
    if kind == "small deviations":
        std[rng.random(features) < 0.01] = 1e-5  # below the floor of 1e-3
    arrays = {
        "x": x,
        "mean": np.zeros(d) if tied else 0.5 * rng.standard_normal(d),
        "std": np.ones(features) if tied else std,
        "bias": np.zeros(features) if tied else 0.3 * rng.standard_normal(features),
        "cotangent": rng.standard_normal((tokens, d)),
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}


@functools.partial(jax.jit, static_argnames=("levels", "forward_standardized", "generators"))
def value_and_gradients(x: Any, mean: Any, std: Any, bias: Any, cotangent: Any, **static: Any) -> Any:
    def f(x: Any, mean: Any, std: Any, bias: Any) -> Any:
        return encode_decode(x, mean, std, bias, **static)

    x_hat, vjp, ids = jax.vjp(f, x, mean, std, bias, has_aux=True)
    return x_hat, ids, vjp(cotangent)


def split(ids: np.ndarray, levels: dictionary.Levels) -> list[np.ndarray]:
    return np.split(np.asarray(ids), np.cumsum([k for _, k, _ in levels])[:-1], axis=-1)


def check_selection(
    ids: np.ndarray, code: reference.Code, inputs: dict[str, np.ndarray], levels: dictionary.Levels
) -> tuple[np.ndarray, int]:
    """(which tokens agree on all sets, differing levels); a set may differ only by features that float32 cannot tell apart."""
    x, mean, std, bias = (inputs[name].astype(np.float64) for name in ("x", "mean", "std", "bias"))
    d, equal, ties = x.shape[-1], np.ones(len(x), bool), 0
    for mine, theirs, level in zip(split(ids, levels), split(code.ids, levels), range(len(levels)), strict=True):
        own = dictionary.level_range(levels, level)
        assert mine.min() >= own.start and mine.max() < own.stop
        for token in range(len(x)):
            a, b = set(mine[token].tolist()), set(theirs[token].tolist())
            assert len(a) == levels[level][1]
            if not equal[token] or a == b:  # below a level that differs the candidates do too
                continue
            equal[token], ties = False, ties + 1
            only = np.array(sorted(a ^ b))
            y = reference.scores(x[token] - mean, only) / np.maximum(std[only], 1e-3) + bias[only]
            size = (np.abs(x[token]).sum() + np.abs(mean).sum()) / np.sqrt(d) / np.maximum(std[only], 1e-3).min()
            assert np.ptp(y) <= EPS * (2 * size + 4 * np.abs(y).max()), f"token {token}, level {level}"
    return equal, ties


def check(kind: str, levels: dictionary.Levels, tokens: int, **static: Any) -> None:
    inputs = make_inputs(kind, levels, tokens)
    arrays = [inputs[name] for name in ("x", "mean", "std", "bias")]
    code = reference.encode_decode(*arrays, levels, **static)
    ids = value_and_gradients(**inputs, levels=levels, **static)[1]
    equal, ties = check_selection(ids, code, inputs, levels)
    print(f"{kind}: {ties} of {tokens * len(levels)} sets differ, by float32 ties")
    assert ties == 0 if kind in ("tied", "random") else ties <= 0.02 * tokens * len(levels)
    inputs["cotangent"] *= equal[:, None]  # the others' features are other ones
    x_hat, _, (dx, dmean, dstd, dbias) = value_and_gradients(**inputs, levels=levels, **static)
    arguments = {} if "forward_standardized" not in static else {"forward_standardized": static["forward_standardized"]}
    expected_dx, expected_dbias = reference.gradients(code, inputs["std"], inputs["cotangent"], **arguments)
    assert not dmean.any() and not dstd.any()
    for mine, theirs in ((x_hat[equal], code.x_hat[equal]), (dx, expected_dx), (dbias, expected_dbias)):
        difference, size = np.abs(mine - theirs).max(), np.abs(theirs).max()
        print(f"  |difference| {difference:.1e} of {size:.1e}")
        assert difference <= 20 * EPS * size + 1e-30


@pytest.mark.parametrize("forward_standardized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind: str, forward_standardized: bool) -> None:
    check(kind, D64, 37, forward_standardized=forward_standardized)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_children_match_reference(kind: str) -> None:
    check(kind, D64, 37, generators="prefix")


def test_matches_reference_at_the_quickstart_size() -> None:
    check("random", D128, 65)


@pytest.mark.slow
@pytest.mark.parametrize("generators", ["spread", "prefix"])
def test_matches_reference_at_1024(generators: str) -> None:
    check("random", D1024, 5, generators=generators)


@st.composite
def any_levels(draw: st.DrawFn) -> tuple[dictionary.Levels, str]:
    t = draw(st.integers(3, 6))
    generators = draw(st.sampled_from(["spread", "prefix"]))
    levels = [(t, draw(st.integers(1, 2**t)), 0)]
    while len(levels) < 3 and levels[-1][0] < 2 * t and draw(st.booleans()):
        below = levels[-1][0]
        n = draw(st.integers(below + 1, min(2 * t, below + 3)))
        degree = 2 ** draw(st.integers(n - below, min(below, n - below + 3)))
        try:
            dictionary.check_levels((*levels, (n, 1, degree)), 2**t, generators)
        except ValueError:  # dependent generators
            assume(False)
        fewest = dictionary.children((*levels, (n, 1, degree)), generators, len(levels)).fewest_candidates(levels[-1][1])
        levels.append((n, draw(st.sampled_from([1, fewest // 2 or 1, fewest])), degree))
    return tuple(levels), generators


@settings(max_examples=5)  # each compiles a program
@given(any_levels(), st.integers(1, 9), st.sampled_from(["random", "tied"]))
def test_any_levels_match_reference(levels: tuple[dictionary.Levels, str], tokens: int, kind: str) -> None:
    inputs = make_inputs(kind, levels[0], tokens)
    arrays = [inputs[name] for name in ("x", "mean", "std", "bias")]
    code = reference.encode_decode(*arrays, levels[0], generators=levels[1])
    x_hat, ids = jax.jit(lambda *a: encode_decode(*a, levels[0], generators=levels[1]))(*arrays)
    equal, _ = check_selection(ids, code, inputs, levels[0])
    np.testing.assert_allclose(x_hat[equal], code.x_hat[equal], atol=20 * EPS * np.abs(code.x_hat).max())


def test_most_tied_inputs_take_the_lowest_ids() -> None:
    """Everything scores 0: the lowest ids of level 0, and of each set of candidates."""
    x, mean = jnp.zeros((3, 64)), jnp.zeros(64)
    x_hat, ids = jax.jit(lambda x: encode_decode(x, mean, jnp.ones(2048), jnp.zeros(2048), D64))(x)
    assert not x_hat.any()
    selected = set(range(4))
    for level, mine in enumerate(split(ids, D64)):
        if level:
            candidates = {f ^ u for f in selected for u in reference.child_steps(D64, level, "spread")}
            selected = set(sorted(candidates)[: D64[level][1]])
        assert all(set(row.tolist()) == selected for row in mine)


@functools.partial(jax.jit, static_argnames=("dtype", "forward_standardized"))
def run64(x: jax.Array, dtype: Any = jnp.float32, forward_standardized: bool = True) -> Any:
    _, mean, std, bias, _ = make_inputs("random", SHALLOW, 1).values()
    return encode_decode(x.astype(dtype), mean, std, bias, SHALLOW, forward_standardized=forward_standardized)


@pytest.mark.parametrize("forward_standardized", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("how_many", [1, 64])
def test_input_that_is_not_finite(value: float, how_many: int, forward_standardized: bool) -> None:
    """Its output is not finite either, its ids are distinct children of those before, and other tokens are as they were."""
    x = make_inputs("random", D64, 5)["x"]
    expected_x_hat, expected_ids = run64(x, forward_standardized=forward_standardized)
    x[2, :how_many] = value
    x_hat, ids = run64(x, forward_standardized=forward_standardized)
    if value != 3e38:  # finite, its scores are not all
        assert not np.isfinite(x_hat[2]).any()
    candidates, selected = set(range(64)), set()
    for level, mine in enumerate(split(ids[2], SHALLOW)):
        if level:
            candidates = {f ^ u for f in selected for u in reference.child_steps(SHALLOW, level, "spread")}
        selected = set(mine.tolist())
        assert len(selected) == SHALLOW[level][1] and selected <= candidates
    others = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(x_hat[others], expected_x_hat[others])
    np.testing.assert_array_equal(ids[others], expected_ids[others])


@pytest.mark.parametrize("forward_standardized", [True, False])
def test_not_finite_statistics_and_bias_reach_the_output(forward_standardized: bool) -> None:
    x, mean, std, bias, _ = make_inputs("random", D64, 3).values()
    program = jax.jit(lambda *a: encode_decode(*a, D64, forward_standardized=forward_standardized))
    fifth = np.arange(len(bias)) == 5
    nan_std, nan_bias = (np.where(fifth, np.nan, array) for array in (std, bias))
    for arrays in ((x, mean * np.nan, std, bias), (x, mean, nan_std, bias), (x, mean, std, nan_bias)):
        x_hat, ids = program(*(np.float32(a) for a in arrays))
        assert not np.isfinite(x_hat).all(1).any() and ids.min() >= 0 and ids.max() < 2048


def test_bfloat16_is_scored_exactly() -> None:
    """The same sets as those of the same numbers in float32; outputs are rounded once."""
    inputs = make_inputs("random", SHALLOW, 37)
    x, cotangent = (jnp.asarray(inputs.pop(name), jnp.bfloat16) for name in ("x", "cotangent"))
    x_hat, ids, (dx, _, _, dbias) = value_and_gradients(x=x, cotangent=cotangent, **inputs, levels=SHALLOW)
    x, cotangent = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    wide, wide_ids, (wide_dx, _, _, wide_dbias) = value_and_gradients(x=x, cotangent=cotangent, **inputs, levels=SHALLOW)
    np.testing.assert_array_equal(np.sort(ids), np.sort(wide_ids))
    assert x_hat.dtype == dx.dtype == jnp.bfloat16 and dbias.dtype == jnp.float32
    np.testing.assert_allclose(x_hat.astype(jnp.float32), wide, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dx.astype(jnp.float32), wide_dx, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dbias, wide_dbias, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2, 0), (2, 1, 7)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    x = make_inputs("random", D64, 21)["x"]
    tokens = int(np.prod(shape))
    expected = run64(x)
    x_hat, ids = run64(x[:tokens].reshape(*shape, 64))
    assert x_hat.shape == (*shape, 64) and ids.shape == (*shape, 12) and ids.dtype == jnp.int32
    np.testing.assert_allclose(x_hat.reshape(tokens, 64), expected[0][:tokens], atol=1e-5)
    np.testing.assert_array_equal(np.sort(ids.reshape(tokens, 12)), np.sort(expected[1][:tokens]))


@given(st.integers(0, 5000), st.integers(1, 10**6), st.integers(1, 10**8))
def test_chunks_cover_all_rows_within_the_budget(rows: int, row_bytes: int, budget: int) -> None:
    chunks, size = xla._chunks(rows, row_bytes, budget)
    assert chunks >= 1 and 0 <= chunks * size - rows < chunks
    assert size * row_bytes <= budget or size <= 1


@pytest.mark.parametrize("tokens", [1, 37])
def test_chunking_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("random", SHALLOW, tokens)
    whole = value_and_gradients(**inputs, levels=SHALLOW)
    monkeypatch.setattr(xla, "CPU_CHUNK_BYTES", 5 * 4 * 12 * 64)
    chunked = jax.jit(functools.partial(value_and_gradients.__wrapped__, levels=SHALLOW))(**inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked, whole)


def test_vmap_checkpoint_and_shard_map() -> None:
    inputs = make_inputs("random", SHALLOW, 48)
    x_hat, ids, (dx, _, _, dbias) = value_and_gradients(**inputs, levels=SHALLOW)
    x, mean, std, bias, cotangent = inputs.values()

    def loss(x: jax.Array, bias: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, Any]:
        x_hat, ids = encode_decode(x, mean, std, bias, SHALLOW)
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
    (batched_dx, batched_dbias), (batched_x_hat, batched_ids) = jax.jit(batched)(next(in_rows), bias, next(in_rows))
    results = [
        ((batched_dx.reshape(48, 64), batched_dbias.sum(0)), (batched_x_hat.reshape(48, 64), batched_ids.reshape(48, 12))),
        jax.jit(again)(x, bias, cotangent),
        jax.jit(sharded)(x, bias, cotangent),
    ]
    for (mine_dx, mine_dbias), (mine_x_hat, mine_ids) in results:
        np.testing.assert_array_equal(np.sort(mine_ids), np.sort(ids))
        for mine, theirs in ((mine_x_hat, x_hat), (mine_dx, dx), (mine_dbias, dbias)):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("forward_standardized", [True, False])
def test_backward_pass_keeps_four_bytes_a_selected_feature(forward_standardized: bool) -> None:
    """448 bytes a token at 16 + 32 + 64; beside them only what is as large as the dictionary."""
    tokens, active, features = 7, 112, 2**17

    def residuals(x: Any, mean: Any, std: Any, bias: Any) -> list[Any]:
        def f(x: Any, bias: Any) -> Any:
            return encode_decode(x, mean, std, bias, D1024, forward_standardized=forward_standardized)

        return jax.tree.leaves(jax.vjp(f, x, bias, has_aux=True)[1])

    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    saved = jax.eval_shape(residuals, float32((tokens, 1024)), float32((1024,)), float32((features,)), float32((features,)))
    shapes = [(leaf.dtype, leaf.shape) for leaf in saved if leaf.shape != (features,)]
    assert shapes == [(jnp.int32, (tokens, active))]
    assert len(saved) == 1 + forward_standardized


def arrays_of(jaxpr: Any) -> list[Any]:
    """The abstract values of all intermediates, those of inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found += [v.aval for v in equation.outvars]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            found += arrays_of(inner) if hasattr(inner, "eqns") else []
    return found


def test_never_scores_all_features_of_all_tokens() -> None:
    levels, tokens = ((6, 4, 0), (9, 8, 32), (12, 12, 16)), 640
    inputs = make_inputs("random", levels, tokens)
    arrays = arrays_of(jax.make_jaxpr(functools.partial(value_and_gradients, levels=levels))(**inputs).jaxpr)
    candidates = max(4 * 28, 8 * 14)
    assert len(arrays) > 200 and any(a.size == tokens * 24 for a in arrays)
    assert max(a.size for a in arrays) <= tokens * max(
        24 * 64, candidates
    )  # the signs of the atoms; 4096 features would be more


def test_a_cpu_selects_by_its_own_top_k() -> None:
    """Not by sorting, to which the compiler falls back where it does not recognize a top_k: ten times slower in all."""
    program = run64.lower(jnp.zeros((37, 64))).compile().as_text()
    assert program.count('custom_call_target="TopK"') >= len(SHALLOW)
    assert "f32[37,112]{1,0}, s32[37,112]{1,0}) sort(" not in program


def test_helpers_against_reference() -> None:
    rng = np.random.default_rng(3)
    x, ids = rng.standard_normal((2, 3, 64)).astype(np.float32), rng.integers(0, 2048, (2, 3, 5))
    everything = np.array([reference.scores(row, np.arange(2048)) for row in x.reshape(6, 64)])
    np.testing.assert_allclose(jax.jit(cayley.all_scores, static_argnums=1)(x, 11), everything.reshape(2, 3, 2048), atol=1e-5)
    squares = jax.jit(cayley.sum_squared_scores, static_argnums=1)(x.reshape(6, 64), 11)
    np.testing.assert_allclose(squares, (everything**2).sum(0), rtol=1e-5, atol=1e-6)
    expected = np.take_along_axis(everything.reshape(2, 3, 2048), ids, axis=-1)
    np.testing.assert_allclose(jax.jit(cayley.scores_at)(x, ids), expected, atol=1e-5)
    coefficients = rng.standard_normal((2, 3, 5)).astype(np.float32)
    expected = np.einsum("...a,...ad->...d", coefficients, dictionary.atoms(ids, 64))
    np.testing.assert_allclose(jax.jit(cayley.combine, static_argnums=2)(coefficients, ids, 64), expected, atol=1e-5)


def test_running_statistics_from_the_helpers_are_the_references() -> None:
    """Var⟨x, v⟩ = mean ⟨x - mean x, v⟩²."""
    rng = np.random.default_rng(4)
    sample, mean, std = rng.standard_normal((50, 16)) + 2, rng.standard_normal(16), rng.uniform(0.5, 2, 256)
    centre = sample.mean(0)
    variance = cayley.sum_squared_scores(jnp.asarray(sample - centre, jnp.float32), 8) / 50
    expected_mean, expected_std = reference.update_statistics(mean, std, sample)
    np.testing.assert_allclose(0.99 * mean + 0.01 * centre, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(0.99 * std + 0.01 * np.sqrt(variance), expected_std, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": jnp.zeros((3, 64), jnp.float16)}, "x is float16 [3, 64]; expected bfloat16 or float32"),
        ({"x": jnp.zeros((3, 64), jnp.int32)}, "x is int32 [3, 64]"),
        ({"x": jnp.zeros(())}, "x is float32 []"),
        ({"x": jnp.zeros((3, 32))}, "with width 32 it must be log2(32) = 5"),
        ({"mean": jnp.zeros(32)}, "mean is float32 [32]; expected float32 [64]"),
        ({"std": jnp.zeros((2048, 1))}, "std is float32 [2048, 1]; expected float32 [2048]"),
        ({"bias": jnp.zeros(2048, jnp.bfloat16)}, "bias is bfloat16 [2048]; expected float32 [2048]"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; expected \"xla\" or None"),
        ({"generators": "random"}, "generators is 'random'"),
        ({"levels": [[6, 4, 0]]}, "levels is [[6, 4, 0]]; expected a tuple of tuples of three integers"),
        ({"levels": (6, 4, 0)}, "levels is (6, 4, 0); expected"),
        ({"levels": ((6.0, 4, 0),)}, "levels is ((6.0, 4, 0),); expected"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], complaint: str) -> None:
    arguments = {"x": jnp.zeros((3, 64)), "mean": jnp.zeros(64), "std": jnp.ones(2048), "bias": jnp.zeros(2048), "levels": D64}
    with pytest.raises(ValueError) as error:
        encode_decode(**(arguments | change))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_says_once_which_implementation_runs(caplog: pytest.LogCaptureFixture) -> None:
    api._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(2):
            jax.eval_shape(run64.__wrapped__, jax.ShapeDtypeStruct((3, 64), jnp.float32))
    assert [record.getMessage() for record in caplog.records] == ["cayley.encode_decode runs as xla: the only implementation"]
