"""What the tests of the sparse code share: inputs, the calls of the implementations, and what to
expect of a choice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from sngpt_kernels.cayley import dictionary, pallas_triton, reference, xla

D64 = ((6, 4, 0), (9, 8, 32), (11, 12, 16))
D128 = ((7, 8, 0), (10, 16, 32), (12, 32, 32))
D1024 = ((10, 16, 0), (15, 32, 256), (17, 64, 256))
SHALLOW = D64[:2]
KINDS = ("random", "low rank", "constant", "zero", "huge", "tied", "small deviations")
EPS = np.finfo(np.float32).eps


def make_inputs(kind: str, levels: dictionary.Levels, tokens: int) -> dict[str, np.ndarray]:
    """x, mean, std, bias and a cotangent; statistics and biases are those of a model under way,
    trivial only for ties.
    """
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
    # whole numbers and no statistics: many scores are exactly equal, in float32 as in float64
    tied = kind == "tied"
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


CALLS: dict[str, Callable[..., Any]] = {
    "xla": xla.encode_decode,
    "pallas_triton": functools.partial(pallas_triton.encode_decode, interpret=True),
}
# an interpreted kernel is a large program, and runs once or twice
QUICKLY = {"xla_backend_optimization_level": 0}


def call(
    implementation: str,
    x: Any,
    mean: Any,
    std: Any,
    bias: Any,
    levels: dictionary.Levels,
    **static: Any,
) -> Any:
    return CALLS[implementation](x, mean, std, bias, dictionary.Scheme(levels, **static))


def value_and_gradients(
    x: Any,
    mean: Any,
    std: Any,
    bias: Any,
    cotangent: Any,
    *,
    implementation: str = "xla",
    **static: Any,
) -> Any:
    """(x_hat, ids, the gradients of x, mean, std and bias)."""
    if implementation == "reference":
        code = reference.encode_decode(x, mean, std, bias, static.pop("levels"), **static)
        static.pop("generators", None)
        dx, dbias = reference.gradients(code, std, cotangent, **static)
        return code.x_hat, code.ids, (dx, np.zeros_like(mean), np.zeros_like(std), dbias)
    return compiled(implementation, tuple(static.items()))(x, mean, std, bias, cotangent)


@functools.cache
def compiled(implementation: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`value_and_gradients` of an implementation in jax, as one program."""

    def f(x: Any, mean: Any, std: Any, bias: Any, cotangent: Any) -> Any:
        run = functools.partial(call, implementation, **dict(static))
        x_hat, vjp, ids = jax.vjp(run, x, mean, std, bias, has_aux=True)
        return x_hat, ids, vjp(cotangent)

    return jax.jit(f, compiler_options=QUICKLY if implementation == "pallas_triton" else {})


def split(ids: np.ndarray, levels: dictionary.Levels) -> list[np.ndarray]:
    return np.split(np.asarray(ids), np.cumsum([k for _, k, _ in levels])[:-1], axis=-1)


def check_selection(
    ids: np.ndarray, code: reference.Code, inputs: dict[str, np.ndarray], levels: dictionary.Levels
) -> tuple[np.ndarray, int]:
    """(which tokens agree on all sets, differing levels); a set may differ only by features that
    float32 cannot tell apart.
    """
    x, mean, std, bias = (inputs[name].astype(np.float64) for name in ("x", "mean", "std", "bias"))
    d, equal, ties = x.shape[-1], np.ones(len(x), bool), 0
    for mine, theirs, level in zip(
        split(ids, levels), split(code.ids, levels), range(len(levels)), strict=True
    ):
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
            size = (
                (np.abs(x[token]).sum() + np.abs(mean).sum())
                / np.sqrt(d)
                / np.maximum(std[only], 1e-3).min()
            )
            assert np.ptp(y) <= EPS * (2 * size + 4 * np.abs(y).max()), (
                f"token {token}, level {level}"
            )
    return equal, ties


def check(
    implementation: str, kind: str, levels: dictionary.Levels, tokens: int, **static: Any
) -> None:
    inputs = make_inputs(kind, levels, tokens)
    arrays = [inputs[name] for name in ("x", "mean", "std", "bias")]
    code = reference.encode_decode(*arrays, levels, **static)
    run = functools.partial(
        value_and_gradients, implementation=implementation, levels=levels, **static
    )
    ids = run(**inputs)[1]
    equal, ties = check_selection(ids, code, inputs, levels)
    print(f"{kind}: {ties} of {tokens * len(levels)} sets differ, by float32 ties")
    assert ties == 0 if kind in ("tied", "random") else ties <= 0.02 * tokens * len(levels)
    inputs["cotangent"] *= equal[:, None]  # the others' features are other ones
    x_hat, _, (dx, dmean, dstd, dbias) = run(**inputs)
    arguments = (
        {}
        if "forward_standardized" not in static
        else {"forward_standardized": static["forward_standardized"]}
    )
    expected_dx, expected_dbias = reference.gradients(
        code, inputs["std"], inputs["cotangent"], **arguments
    )
    assert not dmean.any() and not dstd.any()
    for mine, theirs in (
        (x_hat[equal], code.x_hat[equal]),
        (dx, expected_dx),
        (dbias, expected_dbias),
    ):
        difference, size = np.abs(mine - theirs), np.abs(theirs).max()
        print(
            f"  |difference| max {difference.max():.1e}, mean {difference.mean():.1e} of {size:.1e}"
        )
        assert difference.max() <= 20 * EPS * size + 1e-30
