"""The shared parts of the sparse code's tests: inputs, calls, and the check of a selection."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from sngpt_kernels.cayley import dictionary, pallas_triton, reference, xla
from sngpt_kernels.cayley.dictionary import Scheme

D64 = ((6, 4, 0), (9, 8, 32), (11, 12, 16))
D128 = ((7, 8, 0), (10, 16, 32), (12, 32, 32))
D1024 = ((10, 16, 0), (15, 32, 256), (17, 64, 256))
D2048 = ((11, 16, 0), (15, 32, 256), (17, 64, 256))
SHALLOW = D64[:2]
S64, RAW64 = Scheme(D64), Scheme(D64, forward_standardized=False)
KINDS = ("random", "low rank", "constant", "zero", "huge", "tied", "small deviations")
EPS = np.finfo(np.float32).eps


def make_inputs(kind, levels, tokens):
    """x, mean, std, bias and a cotangent.

    Statistics and biases are as during training. Only for ties they are trivial.
    """
    rng = np.random.default_rng(len(kind))
    d, features = 2 ** levels[0][0], 2 ** levels[-1][0]
    normal = rng.standard_normal((tokens, d))
    x = {
        "low rank": normal[:, :3] @ rng.standard_normal((3, d)),
        "constant": np.full((tokens, d), 0.7),
        "zero": np.zeros((tokens, d)),
        "huge": 1e4 * normal,
        "tied": rng.integers(-1, 2, (tokens, d)),
    }.get(kind, normal)
    # Integers without statistics: many scores are exactly equal, in float32 as in float64.
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
# An interpreted kernel is a large program that runs once or twice.
QUICKLY = {"xla_backend_optimization_level": 0}


def value_and_gradients(implementation, scheme, inputs):
    """(x_hat, ids, the gradients of x, mean, std and bias)."""
    if implementation == "reference":
        code = reference_code(scheme, inputs)
        dx, dbias = reference_gradients(scheme, code, inputs)
        return code.x_hat, code.ids, (dx, 0 * inputs["mean"], 0 * inputs["std"], dbias)
    names = ("x", "mean", "std", "bias", "cotangent")
    return compiled(implementation, scheme)(*(inputs[name] for name in names))


def reference_code(scheme, inputs):
    arrays = [inputs[name] for name in ("x", "mean", "std", "bias")]
    return reference.encode_decode(*arrays, **vars(scheme))


def reference_gradients(scheme, code, inputs):
    arrays, standardized = (inputs["std"], inputs["cotangent"]), scheme.forward_standardized
    return reference.gradients(code, *arrays, forward_standardized=standardized)


@functools.cache
def compiled(implementation, scheme):
    """`value_and_gradients` of an implementation in jax, as one program."""

    def f(x, mean, std, bias, cotangent):
        run = functools.partial(CALLS[implementation], scheme=scheme)
        x_hat, vjp, ids = jax.vjp(run, x, mean, std, bias, has_aux=True)
        return x_hat, ids, vjp(cotangent)

    return jax.jit(f, compiler_options=QUICKLY if implementation == "pallas_triton" else {})


def split(ids, levels):
    return np.split(np.asarray(ids), np.cumsum([k for _, k, _ in levels])[:-1], axis=-1)


def check_selection(ids, code, inputs, levels):
    """(which tokens agree on all sets, the number of levels that differ).

    Sets may differ only by features that float32 cannot tell apart.
    """
    x, mean, std, bias = (inputs[name].astype(np.float64) for name in ("x", "mean", "std", "bias"))
    d, equal, ties = x.shape[-1], np.ones(len(x), bool), 0
    for level, (mine, theirs) in enumerate(
        zip(split(ids, levels), split(code.ids, levels), strict=True)
    ):
        own = dictionary.level_range(levels, level)
        assert mine.min() >= own.start and mine.max() < own.stop
        for token in range(len(x)):
            a, b = set(mine[token].tolist()), set(theirs[token].tolist())
            assert len(a) == levels[level][1]
            if not equal[token] or a == b:  # after a level that differs, the candidates do too
                continue
            equal[token], ties = False, ties + 1
            only = np.array(sorted(a ^ b))
            deviations = np.maximum(std[only], 1e-3)
            y = reference.scores(x[token] - mean, only) / deviations + bias[only]
            size = (np.abs(x[token]).sum() + np.abs(mean).sum()) / np.sqrt(d) / deviations.min()
            place = f"token {token}, level {level}"
            assert np.ptp(y) <= EPS * (2 * size + 4 * np.abs(y).max()), place
    return equal, ties


def check(implementation, scheme, kind, tokens):
    """The sets, x_hat and the gradients equal those of the reference."""
    inputs = make_inputs(kind, scheme.levels, tokens)
    code = reference_code(scheme, inputs)
    ids = value_and_gradients(implementation, scheme, inputs)[1]
    equal, ties = check_selection(ids, code, inputs, scheme.levels)
    sets = tokens * len(scheme.levels)
    print(f"{kind}: {ties} of {sets} sets differ, by float32 ties")
    assert ties == 0 if kind in ("tied", "random") else ties <= 0.02 * sets
    inputs["cotangent"] *= equal[:, None]  # other tokens have other features
    x_hat, _, (dx, dmean, dstd, dbias) = value_and_gradients(implementation, scheme, inputs)
    assert not dmean.any() and not dstd.any()
    expected_dx, expected_dbias = reference_gradients(scheme, code, inputs)
    check_close("x_hat", x_hat[equal], code.x_hat[equal])
    check_close("dx", dx, expected_dx)
    check_close("dbias", dbias, expected_dbias)


def check_close(name, mine, theirs):
    """The error is at most 20 roundings of the largest element."""
    difference, size = np.abs(mine - theirs), np.abs(theirs).max()
    print(f"  {name}: error max {difference.max():.1e}, mean {difference.mean():.1e} of {size:.1e}")
    assert difference.max() <= 20 * EPS * size + 1e-30, name
