"""The exclusion and the gate after attention: every implementation against numpy's definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch, parity
from sngpt_kernels.dispatch import CannotServe
from sngpt_kernels.epilogue import api, pallas_triton, reference, specs

from tests.kernels.lowering import H100, kernels_of_gradients

INTERPRETED = partial(pallas_triton.finish, interpret=True)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "function",
    [
        partial(api.finish, implementation="xla"),
        partial(INTERPRETED, config=pallas_triton.Config(rows=16)),
    ],
    ids=["xla", "pallas_triton"],
)
# B, T, H, K, h
SHAPES = [(2, 37, 4, 2, 24), (2, 16, 2, 2, 16), (1, 5, 6, 2, 64), (2, 1, 2, 1, 8)]
PARTS = {"exclusive": (True, False), "gated": (False, True), "both": (True, True)}


def draw(B, T, H, K, h, parts=(True, True), seed=0):
    """y, v, the gate and the output's cotangent, float32; None in place of what is left out."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, h), (B, T, K, h), (B, T, H), (H,), (B, T, H, h)
    y, v, logits, bias, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    exclusive, gated = parts
    return y, v if exclusive else None, (logits, bias) if gated else None, dout


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, y, v, gate, dout):
    out, vjp = jax.vjp(function, y, v, gate)
    return out, *vjp(dout)


def expected(*arrays):
    return reference.finish(*arrays[:3]), *reference.gradients(*arrays)


def check(got, want, tolerance):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error, size = np.abs(np.asarray(mine, np.float64) - theirs), np.abs(theirs).max()
        print(f"  {theirs.shape}: error {error.max():.1e}, mean {error.mean():.1e} of {size:.1e}")
        assert error.max() <= tolerance * size


@IMPLEMENTATIONS
class TestImplementation:
    @pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_the_definition(self, function, shape, parts):
        arrays = draw(*shape, parts)
        check(value_and_gradients(function, *arrays), expected(*arrays), 2e-6)

    def test_bfloat16_is_rounded(self, function):
        y, v, (logits, bias), dout = draw(*SHAPES[0])
        y, v, logits, dout = (jnp.asarray(a, jnp.bfloat16) for a in (y, v, logits, dout))
        got = value_and_gradients(function, y, v, (logits, bias), dout)
        dtypes = [array.dtype for array in jax.tree.leaves(got)]
        assert dtypes == [jnp.bfloat16] * 4 + [jnp.float32]
        wide = [np.asarray(a, np.float64) for a in (y, v, logits, dout)]
        check(got, expected(*wide[:2], (wide[2], bias), wide[3]), 2**-6)

    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1e-11, 1e9])
    def test_values_of_and_near_zero(self, function, scale):
        y, v, gate, dout = draw(*SHAPES[1])
        v[:, 3] *= np.float32(scale)
        out, dy, dv, dgate = value_and_gradients(function, y, v, gate, dout)
        want, want_dy, want_dv, want_dgate = expected(y, v, gate, dout)
        check((out, dy, dgate), (want, want_dy, want_dgate), 2e-6)
        rest = np.arange(v.shape[1]) != 3
        check((dv[:, rest], dv[:, 3]), (want_dv[:, rest], want_dv[:, 3]), 2e-6)

    def test_vmap_and_checkpoint(self, function):
        y, v, gate, dout = draw(4, *SHAPES[0][1:])
        want = value_and_gradients(function, y, v, gate, dout)
        check(value_and_gradients(jax.checkpoint(function), y, v, gate, dout), want, 1e-5)

        def halves(array):
            return array.reshape(2, 2, *array.shape[1:])

        mapped = jax.vmap(
            lambda y, v, logits, dout: value_and_gradients(function, y, v, (logits, gate[1]), dout)
        )
        out, dy, dv, (dlogits, dbias) = mapped(*map(halves, (y, v, gate[0], dout)))
        parts = [array.reshape(4, *array.shape[2:]) for array in (out, dy, dv, dlogits)]
        check([*parts, dbias.sum(axis=0)], want, 1e-5)


def test_the_written_gradients_are_those_of_the_definition():
    """By central differences in float64."""
    arrays = jax.tree.map(lambda array: array.astype(np.float64), draw(1, 2, 4, 2, 3))
    inputs, structure = jax.tree.flatten(arrays[:3])
    for which, gradient in enumerate(jax.tree.leaves(reference.gradients(*arrays))):
        for index in np.ndindex(gradient.shape):

            def loss(change, which=which, index=index):
                changed = [array.copy() for array in inputs]
                changed[which][index] += change
                return np.sum(reference.finish(*structure.unflatten(changed)) * arrays[3])

            slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
            assert abs(slope - gradient[index]) < 1e-7


def test_gradients_are_of_two_kernels():
    shapes = (8, 100, 4, 64), (8, 100, 2, 64), (8, 100, 4)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(y, v, logits):
        return jnp.sum(api.finish(y, v, (logits, jnp.ones(4))) ** 2)

    kernels = kernels_of_gradients(loss, (0, 1, 2), arrays)
    assert kernels == {"epilogue_forward": 1, "epilogue_backward": 1}


def test_a_small_case_equals_its_reference_and_xla(monkeypatch):
    (case,) = (case for case in specs.CASES if case.name == "quickstart")
    arguments = case.make(jax.random.key(0))
    error = np.abs(case.run(*arguments, implementation="xla") - case.reference(*arguments))
    assert error.max() < 1e-5
    monkeypatch.setattr(dispatch, "check_heads", lambda *_: None)
    monkeypatch.setattr(pallas_triton, "finish", INTERPRETED)
    monkeypatch.setattr(dispatch, "pallas_triton", lambda *_: pallas_triton)
    assert parity.compare(case, "pallas_triton", jax.random.key(1), rows=1).problem == ""


def test_choice(monkeypatch):
    y, v, _, _ = draw(*SHAPES[2])

    def chosen(device, head_size=64, name=None):
        with dispatch.targeting(device), dispatch.recorded_choices() as choices:
            run = partial(api.finish, implementation=name)
            jax.eval_shape(run, y[..., :head_size], v[..., :head_size])
        return choices

    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: {})
    cpu = dispatch.Device("cpu", "cpu")
    assert chosen(H100) == ["pallas_triton"]
    assert chosen(cpu) == chosen(H100, 20) == chosen(H100, name="xla") == ["xla"]
    with pytest.raises(CannotServe, match="serves head sizes of 8, 16, … 256; the heads have 20"):
        chosen(H100, 20, "pallas_triton")
    with dispatch.recorded_choices() as choices:
        assert api.finish(y) is y
    assert not choices
    table = {"float32_h64_exclusive": {"implementation": "xla"}}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table)
    assert chosen(H100) == ["xla"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones((5, 3, 64))}, "y is float64 [5, 3, 64]"),
        ({"v": np.ones((1, 5, 4, 64), np.float32)}, "with K a divisor of 6, as y is [1, 5, 6, 64]"),
        (
            {"gate": (np.ones((1, 5, 6)), np.ones(6))},
            "logits are float64 [1, 5, 6]; expected float32",
        ),
        (
            {"gate": (np.ones((1, 5, 6), np.float32), np.ones(6))},
            "bias is float64 [6]; expected float32 [6]",
        ),
    ],
)
def test_bad_arguments_are_refused(change, message):
    values = dict(zip(("y", "v", "gate"), draw(*SHAPES[2]), strict=False)) | change
    with pytest.raises(ValueError) as caught:
        api.finish(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)
