"""Queries' and keys' norm, rotation and gain: every implementation against numpy's definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch, parity
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.rotary import api, pallas_triton, reference, specs

from tests.kernels.lowering import H100, kernels_of_gradients

EPS = 1e-6
INTERPRETED = partial(pallas_triton.prepare, interpret=True)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "function",
    [
        lambda *a: api.prepare(*a, eps=EPS, implementation="xla"),
        lambda *a: INTERPRETED(*a, EPS, config=pallas_triton.Config(rows=16)),
    ],
    ids=["xla", "pallas_triton"],
)
# B, T, H, K, h, r; positions of all rows are equal or not
SHAPES = [(2, 37, 4, 2, 24, 8, False), (2, 16, 2, 2, 16, 16, True), (1, 5, 3, 1, 64, 12, False)]


def draw(B, T, H, K, h, r, own=False, seed=0):
    """x, gain, cos, sin and the cotangent of both results side by side, float32."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 9, size=(B if own else 1, T, r // 2))
    x, dy = rng.normal(size=(2, B, T, H + K, h))
    arrays = x, rng.normal(size=H), np.cos(angles), np.sin(angles), dy
    return [array.astype(np.float32) for array in arrays]


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, gain, cos, sin, dy):
    def joined(x, gain):
        q, k = function(x, gain, cos, sin)
        assert q.shape[2] == gain.shape[0]
        return jnp.concatenate([q, k], axis=2)

    out, vjp = jax.vjp(joined, x, gain)
    return out, *vjp(dy)


def expected(x, gain, cos, sin, dy):
    gradients = reference.gradients(x, gain, cos, sin, dy, eps=EPS)
    return reference.prepare(x, gain, cos, sin, eps=EPS), *gradients


def check(got, want, tolerance):
    for name, mine, theirs in zip(("out", "dx", "dgain"), got, want, strict=False):
        error, size = np.abs(np.asarray(mine, np.float64) - theirs), np.abs(theirs).max()
        print(f"  {name:5}: error max {error.max():.1e}, mean {error.mean():.1e} of {size:.1e}")
        assert error.max() <= tolerance * size, name


@IMPLEMENTATIONS
class TestImplementation:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_the_definition(self, function, shape):
        arrays = draw(*shape)
        check(value_and_gradients(function, *arrays), expected(*arrays), 1e-6)

    def test_bfloat16_is_rounded(self, function):
        x, gain, cos, sin, dy = draw(*SHAPES[0])
        low, dlow = (jnp.asarray(array, jnp.bfloat16) for array in (x, dy))
        got = value_and_gradients(function, low, gain, cos, sin, dlow)
        assert got[0].dtype == got[1].dtype == jnp.bfloat16 and got[2].dtype == jnp.float32
        low, dlow = (np.asarray(array, np.float64) for array in (low, dlow))
        # xla sums the gain's gradient in bfloat16
        check(got[:2], expected(low, gain, cos, sin, dlow), 2**-6)

    def test_zero_heads_and_gains(self, function):
        x, gain, cos, sin, dy = draw(*SHAPES[1])
        x[0, 3], gain[0] = 0, 0
        got = value_and_gradients(function, x, gain, cos, sin, dy)
        assert all(np.isfinite(array).all() for array in got)
        check(got, expected(x, gain, cos, sin, dy), 1e-6)

    def test_vmap_and_checkpoint(self, function):
        arrays = draw(4, *SHAPES[0][1:-1])
        want = value_and_gradients(function, *arrays)
        again = value_and_gradients(jax.checkpoint(function), *arrays)
        x, *constants, dy = arrays
        pairs = (array.reshape(2, 2, *array.shape[1:]) for array in (x, dy))
        mapped = jax.vmap(lambda x, dy: value_and_gradients(function, x, *constants, dy))
        out, dx, dgain = mapped(*pairs)
        batched = out.reshape(x.shape), dx.reshape(x.shape), dgain.sum(axis=0)
        for got in (again, batched):
            for mine, theirs in zip(got, want, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("values", [(1,), (2, 1)])
@pytest.mark.parametrize("interpreted", [False, True])
def test_values_are_copied(interpreted, values):
    """And so are their cotangents, beside the gradients of queries and keys."""
    B, T, H, *others = SHAPES[0]
    x, gain, cos, sin, dy = draw(B, T, H, 1 + sum(values), *others[1:])
    end = H + 1

    def function(x, gain, cos, sin):
        run = partial(INTERPRETED, config=pallas_triton.Config(rows=16))
        prepare = run if interpreted else partial(api.prepare, implementation="xla")
        q, *others = prepare(x, gain, cos, sin, eps=EPS, values=values)
        assert [part.shape[2] for part in others] == [1, *values]
        return q, jnp.concatenate(others, axis=2)

    out, dx, dgain = value_and_gradients(function, x, gain, cos, sin, dy)
    want, want_dx, want_dgain = expected(x[:, :, :end], gain, cos, sin, dy[:, :, :end])
    check((out[:, :, :end], dx[:, :, :end], dgain), (want, want_dx, want_dgain), 1e-6)
    assert np.array_equal(out[:, :, end:], x[:, :, end:])
    assert np.array_equal(dx[:, :, end:], dy[:, :, end:])
    check([out], [reference.prepare(x, gain, cos, sin, eps=EPS, values=sum(values))], 1e-6)
    for wrong in ((*values, 1), (0,)):
        message = f"counts above 0 of at most {sum(values)} heads in all"
        with pytest.raises(ValueError, match=message):
            api.prepare(x, gain, cos, sin, eps=EPS, values=wrong)


def test_the_written_gradients_are_those_of_the_definition():
    """By central differences in float64."""
    arrays = [array.astype(np.float64) for array in draw(1, 3, 2, 1, 6, 4)]
    *inputs, dy = arrays
    for which, gradient in enumerate(reference.gradients(*arrays, eps=EPS)):
        for index in np.ndindex(gradient.shape):

            def loss(change, which=which, index=index):
                changed = [array.copy() for array in inputs]
                changed[which][index] += change
                return np.sum(reference.prepare(*changed, eps=EPS) * dy)

            slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
            assert abs(slope - gradient[index]) < 1e-7


@pytest.mark.parametrize("rotary", [64, 16])
def test_gradients_are_of_two_kernels(rotary):
    shapes = (8, 100, 6, 64), (4,), (1, 100, rotary // 2), (1, 100, rotary // 2)
    dtypes = jnp.bfloat16, *(jnp.float32,) * 3
    arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    tables = [jnp.ones(array.shape) for array in arguments[2:]]

    def loss(x, gain):
        q, k = api.prepare(x, gain, *tables, eps=EPS)
        return jnp.sum(q**2) + jnp.sum(k**2)

    kernels = kernels_of_gradients(loss, (0, 1), arguments[:2])
    assert kernels == {"rotary_forward": 1, "rotary_backward": 1}


def test_a_small_case_equals_its_reference_and_xla(monkeypatch):
    (case,) = (case for case in specs.CASES if case.name == "quickstart")
    arguments = case.make(jax.random.key(0))
    error = np.abs(case.run(*arguments, implementation="xla") - case.reference(*arguments))
    assert error.max() < 1e-5
    monkeypatch.setattr(dispatch, "check_heads", lambda *_: None)
    monkeypatch.setattr(pallas_triton, "prepare", INTERPRETED)
    monkeypatch.setattr(dispatch, "pallas_triton", lambda *_: pallas_triton)
    assert parity.compare(case, "pallas_triton", jax.random.key(1), rows=1).problem == ""


@pytest.mark.parametrize(
    ("device", "head_size", "chosen"),
    [
        (Device("cpu", "cpu"), 64, "xla"),
        (H100, 64, "pallas_triton"),
        (H100, 20, "xla"),
        (Device("rocm", "AMD Instinct MI300X"), 64, "xla"),
    ],
)
def test_choice(device, head_size, chosen, monkeypatch):
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: {})
    dtype = jnp.dtype(jnp.bfloat16)
    with dispatch.targeting(device):
        assert api.choose(dtype, head_size, None) == chosen
        if chosen == "xla":
            with pytest.raises(CannotServe, match="pallas_triton serves"):
                api.choose(dtype, head_size, "pallas_triton")
        table = {f"bfloat16_h{head_size}": {"implementation": "xla"}}
        monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table)
        assert api.choose(dtype, head_size, None) == "xla"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((5, 3, 64))}, "x is float32 [5, 3, 64]"),
        ({"gain": jnp.ones(9)}, "gain is float32 [9]; expected float32 [H], H at most 4"),
        ({"cos": jnp.ones((1, 4, 6))}, "cos is float32 [1, 4, 6]; expected [1 or 1, 5"),
        ({"sin": jnp.ones((1, 5, 4))}, "sin is float32 [1, 5, 4]; expected float32 [1, 5, 6]"),
        ({"eps": 0.0}, "eps is 0.0; expected a number above 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    names = ("x", "gain", "cos", "sin")
    values = dict(zip(names, draw(*SHAPES[2])[:4], strict=True)) | {"eps": EPS} | change
    with pytest.raises(ValueError) as caught:
        api.prepare(**{name: jnp.asarray(a) if name in names else a for name, a in values.items()})
    assert message in str(caught.value) and "\n" not in str(caught.value)
