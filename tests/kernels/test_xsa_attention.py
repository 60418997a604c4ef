"""Causal attention, exclusive or not: every implementation against the definition in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sngpt_kernels.epilogue import pallas_triton as epilogue
from sngpt_kernels.xsa import api as xsa
from sngpt_kernels.xsa import pallas_triton, reference, xla
from sngpt_kernels.xsa.pallas_tiles import Blocks, Config

# several tiles of a short sequence
SMALL = Config(Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2), Blocks(16, 16, 4, 2))


def interpreted(q, k, v, *, exclusive, scale, config=SMALL):
    q, k, v = map(jnp.asarray, (q, k, v))
    y = pallas_triton.attention(q, k, v, scale, config=config, interpret=True)
    return epilogue.finish(y, v, None, interpret=True) if exclusive else y


XLA = partial(xsa.attention, implementation="xla")
IMPLEMENTATIONS = pytest.mark.parametrize(
    "function", [XLA, interpreted], ids=["xla", "pallas_triton"]
)
STATIC = {"exclusive": True, "scale": 0.3}
SHAPES = [(2, 37, 4, 2, 32), (1, 33, 2, 2, 40)]  # B, T, H, K, h


def draw(shape, seed=0):
    """q, k, v and a cotangent, float32."""
    B, T, H, K, h = shape
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, heads, h)).astype(np.float32) for heads in (H, K, K, H)]


@partial(jax.jit, static_argnums=0, static_argnames=("exclusive", "scale"))
def value_and_gradients(function, q, k, v, cotangent, **static):
    out, vjp = jax.vjp(lambda *a: function(*a, **static), q, k, v)
    return out, *vjp(cotangent)


def check(got, want, tolerance, least=0):
    """Each of output, dq, dk, dv within tolerance of its largest entry, or of `least`."""
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error, size = np.abs(np.asarray(mine, np.float64) - theirs), np.abs(theirs).max()
        print(f"  {name:3}: error max {error.max():.1e}, mean {error.mean():.1e} of {size:.1e}")
        assert error.max() <= tolerance * max(size, least), name


def expected(q, k, v, cotangent, **static):
    gradients = reference.gradients(q, k, v, cotangent, **static)
    return reference.attention(q, k, v, **static), *gradients


@IMPLEMENTATIONS
class TestImplementation:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("exclusive", [False, True])
    def test_equals_the_definition(self, function, shape, exclusive):
        arrays, static = draw(shape), {"exclusive": exclusive, "scale": 0.3}
        got = value_and_gradients(function, *arrays, **static)
        check(got, expected(*arrays, **static), 3e-6)

    def test_bfloat16_is_rounded_as_inputs_and_outputs_are(self, function):
        arrays, static = draw((1, 37, 4, 2, 32)), {"exclusive": True, "scale": 32**-0.5}
        low = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
        got = value_and_gradients(function, *low, **static)
        assert all(array.dtype == jnp.bfloat16 for array in got)
        check(got, expected(*(np.asarray(array, np.float64) for array in low), **static), 2**-6)

    def test_later_positions_have_no_influence(self, function):
        """With the program of the definition's test."""
        arrays = draw(SHAPES[0])
        first, *_ = value_and_gradients(function, *arrays, **STATIC)
        for array in arrays[:3]:
            array[:, 20:] = 1e4
        again, *_ = value_and_gradients(function, *arrays, **STATIC)
        np.testing.assert_array_equal(again[:, :20], first[:, :20])

    def test_large_scores(self, function):
        """Products of some thousands. An exponential would overflow without the maximum."""
        arrays, static = draw((1, 21, 2, 2, 8)), {"exclusive": False, "scale": 700.0}
        got = value_and_gradients(function, *arrays, **static)
        check(got, expected(*arrays, **static), 1e-3)

    @pytest.mark.full
    def test_vmap_checkpoint_and_shard_map(self, function):
        arrays, function = draw((8, 19, 4, 2, 8)), partial(function, **STATIC)
        gradients = partial(value_and_gradients, function)
        want = gradients(*arrays)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = PartitionSpec("data")
        specs = {"in_specs": rows, "out_specs": rows, "check_vma": False}
        sharded = jax.jit(jax.shard_map(gradients, mesh=mesh, **specs))(*arrays)
        pairs = [array.reshape(4, 2, *array.shape[1:]) for array in arrays]
        batched = jax.vmap(gradients)(*pairs)
        batched = [array.reshape(8, *array.shape[2:]) for array in batched]
        again = value_and_gradients(jax.checkpoint(function), *arrays)
        for got in (sharded, batched, again):
            for mine, theirs in zip(got, want, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_written_gradients_are_those_of_the_definition(exclusive):
    """By central differences in float64. One value is below the floor of the norm."""
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(1, 4, heads, 3)) for heads in (4, 2, 2)]
    cotangent = rng.normal(size=(1, 4, 4, 3))
    inputs[2][0, 2, 1] *= 1e-13
    got = reference.gradients(*inputs, cotangent, exclusive=exclusive, scale=0.7)
    for which, gradient in enumerate(got):
        for index in np.ndindex(gradient.shape):
            small = which == 2 and index[1:3] == (2, 1)
            step = 1e-17 if small else 1e-5

            def loss(change, which=which, index=index):
                changed = [array.copy() for array in inputs]
                changed[which][index] += change
                out = reference.attention(*changed, exclusive=exclusive, scale=0.7)
                return float(np.sum(cotangent * out))

            slope = (loss(step) - loss(-step)) / (2 * step)
            assert abs(slope - gradient[index]) <= (1e3 if small else 1e-8)


@pytest.mark.parametrize(
    ("blocks", "length"),
    [((16, 32), 1), ((32, 16), 16), ((16, 32), 31), ((32, 16), 64), ((64, 16), 65)],
)
def test_any_tiles_and_lengths(blocks, length):
    """Tiles that are longer than the text, as long, that divide it, and that do not."""
    arrays = draw((1, length, 2, 1, 16), seed=length)
    function = partial(interpreted, config=Config(*(Blocks(*blocks, 4, 2),) * 3))
    static = STATIC | {"exclusive": False}
    got = value_and_gradients(function, *arrays, **static)
    check(got, expected(*arrays, **static), 4e-6, least=1)


def test_equals_jax_nn():
    """Another library's attention, and its gradients."""
    arrays = draw((2, 33, 6, 3, 16))
    function = partial(jax.nn.dot_product_attention, is_causal=True)
    library = value_and_gradients(function, *arrays, scale=0.2)
    got = value_and_gradients(XLA, *arrays, exclusive=False, scale=0.2)
    check(got, tuple(np.asarray(array, np.float64) for array in library), 3e-6)


def test_masked_attention_of_one_position_is_its_row():
    """Each row of the batch is at another position, as in generation."""
    q, k, v, _ = draw((3, 9, 4, 2, 8))
    position = np.array([0, 4, 8])
    rows = np.arange(3)
    mask = np.arange(9)[None, None, :] <= position[:, None, None]
    got = xla.masked_attention(
        jnp.asarray(q[rows, position][:, None]), k, v, jnp.asarray(mask), scale=0.3
    )
    want = reference.attention(q, k, v, exclusive=False, scale=0.3)[rows, position]
    np.testing.assert_allclose(got[:, 0], want, atol=2e-6)


def test_the_mask_is_no_constant_of_the_program():
    """A [T, T] constant per layer would make the program grow with T squared."""
    q, k = (jax.ShapeDtypeStruct((1, 512, heads, 8), jnp.float32) for heads in (2, 1))
    program = jax.jit(partial(xsa.attention, exclusive=True, scale=1.0, implementation="xla"))
    assert len(program.lower(q, k, k).as_text()) < 20_000
