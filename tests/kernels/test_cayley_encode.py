"""Scoring and selection on chip, in interpret mode, against the float64 reference."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from sngpt_kernels.cayley import dictionary, pallas_encode, pallas_triton, reference
from sngpt_kernels.cayley.dictionary import Scheme
from sngpt_kernels.dispatch import CannotServe

from sngpt_jax.ahead import targets

D64 = ((6, 4, 0), (9, 8, 32), (11, 12, 16))
ODD = ((6, 5, 0), (9, 19, 32), (11, 23, 16))  # no k is a power of two; a second block of parents
D128 = ((7, 8, 0), (10, 16, 32), (12, 32, 32))
D1024 = ((10, 16, 0), (15, 32, 256), (17, 64, 256))
D2048 = ((11, 16, 0), (15, 32, 256), (17, 64, 256))
KINDS = ("random", "constant", "zero", "huge", "tied", "small deviations")


@functools.partial(
    jax.jit, static_argnames=("levels", "generators", "forward_standardized", "interpret")
)
def encode(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: dictionary.Levels,
    generators: str = "spread",
    forward_standardized: bool = True,
    interpret: bool = True,
) -> Any:
    """(saved, c) by a kernel whose every program encodes two tokens."""
    tokens = len(x)
    scheme = Scheme(levels, forward_standardized, generators)
    constants = pallas_encode.constants(scheme)
    tables = pallas_encode.tables(mean, std, bias, scheme)

    def cayley_encode(*refs: Any) -> None:
        (x_ref, *inputs), (saved_ref, c_ref) = refs[:-2], refs[-2:]
        first = pl.program_id(0) * 2

        def body(i: jax.Array, _: None) -> None:
            pallas_encode.encode_token(
                first + i,
                x_ref,
                tuple(inputs[: len(constants)]),
                tuple(inputs[len(constants) :]),
                saved_ref,
                c_ref,
                scheme,
                interpret,
            )

        jax.lax.fori_loop(0, 2, body, None)

    return pl.pallas_call(
        cayley_encode,
        out_shape=tuple(
            jax.ShapeDtypeStruct((tokens, scheme.active), dtype)
            for dtype in (jnp.int32, jnp.float32)
        ),
        grid=(tokens // 2,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="cayley_encode",
        interpret=interpret,
    )(x, *map(jnp.asarray, constants), *tables)


def make_inputs(kind: str, levels: dictionary.Levels, tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(len(kind))
    d, features = 2 ** levels[0][0], 2 ** levels[-1][0]
    x = rng.standard_normal((tokens, d))
    x = {
        "constant": np.full_like(x, 0.7),
        "zero": 0 * x,
        "huge": 1e4 * x,
        "tied": rng.integers(-1, 2, x.shape),
    }.get(kind, x)
    mean, std, bias = (
        0.5 * rng.standard_normal(d),
        rng.uniform(0.3, 2, features),
        0.3 * rng.standard_normal(features),
    )
    # whole numbers and no statistics: many scores are exactly equal, in float32 as in float64
    if kind == "tied":
        mean, std, bias = 0 * mean, 1 + 0 * std, 0 * bias
    if kind == "small deviations":
        std[rng.random(features) < 0.01] = 1e-5
    return [array.astype(np.float32) for array in (x, mean, std, bias)]


def check(
    kind: str, levels: dictionary.Levels, tokens: int = 6, dtype: Any = np.float32, **static: Any
) -> None:
    x, *rest = make_inputs(kind, levels, tokens)
    x = np.asarray(x, dtype)
    saved, c = map(np.asarray, encode(x, *rest, levels=levels, **static))
    code = reference.encode_decode(x, *rest, levels, **static)
    ids = saved & (2**30 - 1)
    start = 0
    for _, k, _ in levels:
        part = slice(start, start + k)
        mine, theirs = np.argsort(ids[:, part], axis=1), np.argsort(code.ids[:, part], axis=1)
        np.testing.assert_array_equal(
            *(np.take_along_axis(a[:, part], o, 1) for a, o in ((ids, mine), (code.ids, theirs)))
        )
        values, expected = (
            np.take_along_axis(a[:, part], o, 1) for a, o in ((c, mine), (code.c, theirs))
        )
        error = np.abs(values - expected)
        print(
            f"{kind} [{start}:{start + k}]: error max {error.max():.1e} mean {error.mean():.1e} of"
            f" {np.abs(expected).max():.1e}"
        )
        assert error.max() <= 20 * np.finfo(np.float32).eps * np.abs(code.c).max()
        start += k
    np.testing.assert_array_equal(saved >> 30, c > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind: str) -> None:
    check(kind, D64)


@pytest.mark.parametrize("kind", ["random", "tied", "small deviations"])
@pytest.mark.parametrize("generators", ["spread", "prefix"])
def test_raw_scores_match_reference(kind: str, generators: str) -> None:
    check(kind, D64, generators=generators, forward_standardized=False)


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_several_blocks_of_parents_match_reference(kind: str) -> None:
    check(kind, ODD)


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_bfloat16_matches_reference(kind: str) -> None:
    check(kind, D128, dtype=jnp.bfloat16)


def test_one_level_matches_reference() -> None:
    check("random", ((9, 16, 0),), dtype=jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "dtype"), [(D1024, jnp.bfloat16), (D2048, jnp.bfloat16)])
def test_matches_reference_at_the_recipes_sizes(levels: dictionary.Levels, dtype: Any) -> None:
    check("random", levels, tokens=2, dtype=dtype)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_token_that_is_not_finite_has_valid_ids_and_leaves_the_others_alone(bad: float) -> None:
    x, *rest = make_inputs("random", D64, 6)
    expected_saved, expected_c = map(np.asarray, encode(x, *rest, levels=D64))
    x[3, 17] = bad
    saved, c = map(np.asarray, encode(x, *rest, levels=D64))
    assert np.isinf(c[3]).all()
    start = 0
    for level, (_, k, _) in enumerate(D64):
        ids = saved[3, start : start + k] & (2**30 - 1)
        own = dictionary.level_range(D64, level)
        assert len(set(ids.tolist())) == k and ids.min() >= own.start and ids.max() < own.stop
        start += k
    others = np.arange(6) != 3
    np.testing.assert_array_equal(saved[others], expected_saved[others])
    np.testing.assert_array_equal(c[others], expected_c[others])


@pytest.mark.slow
@pytest.mark.parametrize("levels", [D1024, D2048])
def test_lowers_for_a_gpu(levels: dictionary.Levels) -> None:
    """No GPU and no compiler of one is needed: what the kernel says is what Pallas Triton
    understands.
    """
    d, features = 2 ** levels[0][0], 2 ** levels[-1][0]
    shapes = [
        jax.ShapeDtypeStruct((8, d), jnp.bfloat16),
        *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (d, features, features)),
    ]
    with targets.tracing(targets.find("h100")):
        lowered = encode.trace(*shapes, levels=levels, interpret=False).lower(
            lowering_platforms=("cuda",)
        )
    assert lowered.as_text().count("cayley_encode") >= 1


@pytest.mark.parametrize("levels", [D1024[:1], D1024[:2], D1024])
def test_what_a_thread_stores_is_read_after_a_barrier(levels: dictionary.Levels) -> None:
    """Interpretation cannot show it: between levels, before the end reads ids, before it stores
    them.
    """
    d, features = 2 ** levels[0][0], 2 ** levels[-1][0]
    shapes = [
        jax.ShapeDtypeStruct((8, d), jnp.bfloat16),
        *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (d, features, features)),
    ]
    token = str(encode.trace(*shapes, levels=levels, interpret=False).jaxpr)
    assert token.count("debug_barrier") == len(levels) + 1
    whole = jax.make_jaxpr(
        lambda *arguments: pallas_triton.encode_decode(*arguments, Scheme(levels))
    )(*shapes)
    # and before the tokens are decoded side by side
    assert str(whole).count("debug_barrier") == len(levels) + 2


@pytest.mark.parametrize(
    ("levels", "reason"),
    [(((5, 4, 0),), "width"), (((12, 4, 0),), "width"), (((10, 64, 0), (15, 32, 256)), "level 1")],
)
def test_what_it_cannot_serve_is_said(levels: dictionary.Levels, reason: str) -> None:
    with pytest.raises(CannotServe, match=reason):
        pallas_encode.constants(Scheme(levels))
