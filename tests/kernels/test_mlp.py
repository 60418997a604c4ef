"""The MLP half with epilogues: every implementation against numpy's definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch, parity
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.mlp import api, pallas_triton, reference, specs

from tests import oracles
from tests.kernels.lowering import H100, kernels_of_gradients

EPS, SCALE = 1e-6, 0.5
OPTIONS = {"eps": EPS, "scale": SCALE}
SMALL = pallas_triton.Config(rows=16, columns=16, inner=16)
INTERPRETED = partial(pallas_triton.residual_mlp, interpret=True)
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu2", "leaky_relu2"])
IMPLEMENTATIONS = pytest.mark.parametrize(
    "function",
    [
        lambda *a, activation: api.residual_mlp(
            *a, activation=activation, **OPTIONS, implementation="xla"
        ),
        lambda *a, activation: INTERPRETED(*a, activation, EPS, SCALE, config=SMALL),
    ],
    ids=["xla", "pallas_triton"],
)


def draw(*rows, D=32, E=16, F=48, seed=0):
    """Arrays as the operation takes them, float64."""
    rng = np.random.default_rng(seed)
    matrices = (rng.normal(size=(n, m)) * n**-0.5 for n, m in ((E, D), (D, F), (F, D)))
    return rng.normal(size=(*rows, D)), rng.normal(size=(*rows, E)), *matrices


def relative_errors(got, want):
    return [
        np.abs(np.float64(a) - b).max() / np.abs(b).max() for a, b in zip(got, want, strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, arrays, cotangent):
    value, vjp = jax.vjp(lambda *a: function(*a), *arrays)
    return value, *vjp(cotangent)


@IMPLEMENTATIONS
@ACTIVATIONS
class TestImplementation:
    # whole tiles of rows, and rows that leave a tile half empty
    @pytest.mark.parametrize("rows", [(2, 16), (37,)])
    def test_equals_the_definition(self, function, activation, rows):
        oracles.check(
            partial(function, activation=activation),
            lambda *a: reference.residual_mlp(*a, activation, EPS, SCALE),
            *draw(*rows),
        )

    def test_bfloat16_is_rounded(self, function, activation):
        arrays = [jnp.asarray(a, jnp.bfloat16) for a in (*draw(64), draw(64, seed=1)[0])]
        mine = value_and_gradients(partial(function, activation=activation), arrays[:5], arrays[5])
        assert {a.dtype for a in mine} == {jnp.dtype(jnp.bfloat16)}
        exact = partial(api.residual_mlp, **OPTIONS, activation=activation, implementation="xla")
        wide = [jnp.asarray(a, jnp.float32) for a in arrays]
        want = value_and_gradients(exact, wide[:5], wide[5])
        assert max(relative_errors(mine, want)) <= parity.BOUNDS["bfloat16"]

    def test_vmap_and_checkpoint(self, function, activation):
        function = partial(function, activation=activation)
        arrays, ds = tuple(map(np.float32, draw(3, 8))), np.float32(draw(3, 8, seed=1)[0])
        want = value_and_gradients(function, arrays, ds)
        again = value_and_gradients(jax.checkpoint(function), arrays, ds)
        mapped = jax.vmap(partial(value_and_gradients, function), ((0, 0, None, None, None), 0))(
            arrays, ds
        )
        summed = *mapped[:3], *(d.sum(axis=0) for d in mapped[3:])
        assert max(relative_errors(again, want)) < 1e-6
        assert max(relative_errors(summed, want)) < 1e-5


def test_a_row_without_a_norm_and_a_slope_at_zero():
    arrays = [np.float32(a) for a in draw(16)]
    arrays[0][3] = arrays[1][3] = 0
    function = partial(INTERPRETED, activation="relu2", **OPTIONS, config=SMALL)
    got = value_and_gradients(function, arrays, np.ones_like(arrays[0]))
    assert not got[0][3].any() and all(np.isfinite(a).all() for a in got)


def test_gradients_are_of_products_with_epilogues():
    """The kernels' names, each once; XLA's products are no kernels of ours."""
    x = jax.ShapeDtypeStruct((8, 256, 512), jnp.bfloat16)
    arguments = [x, x, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 512), (512, 1024)))]

    def loss(x, y, out, up):
        run = partial(api.residual_mlp, activation="leaky_relu2", **OPTIONS)
        return jnp.sum(run(x, y, out, up, up.T, implementation="pallas_triton"))

    kernels = kernels_of_gradients(loss, (0, 1, 2, 3), arguments, axes=3)
    names = "mlp_out", "mlp_up", "mlp_down", "mlp_gradient", "stream_backward"
    assert kernels == dict.fromkeys(names, 1)


def test_a_case_equals_its_reference_and_xla(monkeypatch):
    (case,) = (case for case in specs.CASES if case.name == "quickstart")
    arguments = case.make(jax.random.key(0))
    got, want = case.run(*arguments, implementation="xla"), case.reference(*arguments)
    assert relative_errors([got], [want])[0] < 2**-7
    monkeypatch.setattr(api, "check", lambda *_: None)
    monkeypatch.setattr(pallas_triton, "residual_mlp", INTERPRETED)
    monkeypatch.setattr(dispatch, "pallas_triton", lambda *_: pallas_triton)
    assert parity.compare(case, "pallas_triton", jax.random.key(1), rows=128).problem == ""


BFLOAT16, WIDTHS = jnp.dtype(jnp.bfloat16), (512, 512, 1024)


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "activation", "reason"),
    [
        (Device("cpu", "cpu"), BFLOAT16, WIDTHS, "relu2", "serves NVIDIA GPUs"),
        (H100, jnp.dtype(jnp.float32), WIDTHS, "relu2", "serves bfloat16; the stream is float32"),
        (H100, BFLOAT16, WIDTHS, "gelu", "serves relu2 and leaky_relu2, not gelu"),
        (H100, BFLOAT16, (512, 512, 1000), "relu2", "the widths are 512, 512, 1000"),
        (H100, BFLOAT16, WIDTHS, "relu2", ""),
    ],
)
def test_choice(device, dtype, widths, activation, reason, monkeypatch):
    """The kernels run only if they can and a measurement or the recipe says so."""
    table: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table)
    arguments = dtype, widths, activation
    with dispatch.targeting(device):
        assert api.choose(*arguments, None) == "xla"
        table[f"{dtype}_d{widths[1]}_f{widths[2]}"] = {"implementation": "pallas_triton"}
        assert api.choose(*arguments, None) == ("xla" if reason else "pallas_triton")
        if reason:
            with pytest.raises(CannotServe, match=reason):
                api.choose(*arguments, "pallas_triton")
        else:
            assert api.choose(*arguments, "pallas_triton") == "pallas_triton"


def test_a_tile_that_does_not_divide_is_refused():
    wide = pallas_triton.Config(rows=16, columns=32, inner=16)
    with pytest.raises(CannotServe, match="tiles of 32 columns and steps of 16 do not divide"):
        INTERPRETED(*map(jnp.float32, draw(16)), "relu2", EPS, SCALE, config=wide)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones(32)}, "x is float32 [32]; expected bfloat16 or float32 [..., D]"),
        ({"y": jnp.ones((3, 16))}, "y is float32 [3, 16]; expected float32 [4, 16]"),
        ({"down": jnp.ones((32, 48))}, "down is float32 [32, 48]; expected float32 [48, 32]"),
        ({"activation": "gelu"}, "activation is 'gelu'; expected relu2 or leaky_relu2"),
        ({"eps": 0.0}, "eps is 0.0; expected a number above 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    names = "x", "y", "out", "up", "down"
    arrays = dict(zip(names, map(jnp.float32, draw(4)), strict=True))
    with pytest.raises(ValueError) as caught:
        api.residual_mlp(**(arrays | {"activation": "relu2", "eps": EPS} | change))
    assert message in str(caught.value) and "\n" not in str(caught.value)
