"""The stream's sum and norm: every implementation against numpy's definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch, parity
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.stream import api, pallas_triton, reference, specs

from tests.kernels.lowering import H100, kernels_of_gradients

EPS, SCALE = 1e-6, 0.5
INTERPRETED = partial(pallas_triton.sum_norm, interpret=True)
SMALL = pallas_triton.Config(rows=4, sums=16)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "function",
    [
        lambda *a, **k: api.sum_norm(*a, **k, eps=EPS, scale=SCALE, implementation="xla"),
        lambda *a, **k: INTERPRETED(*a, EPS, SCALE, **k, config=SMALL),
    ],
    ids=["xla", "pallas_triton"],
)
# rows, D, each group's number of arrays, if the group has a weight, if there is a gain
SHAPES = {
    "one array": ((2, 16), 32, (1,), (False,), False),
    "a sum and a gain": ((37,), 24, (2,), (False,), True),
    "a mix": ((2, 37), 24, (2, 1), (True, True), False),
    "a mix, a skip and a bias": ((2, 5), 40, (2, 1, 0, 1), (True, False, True, True), True),
}


def draw(shape, seed=0):
    """The groups, weights, gain and the cotangents of u and n, float32."""
    rows, D, counts, weighted, gain = shape
    rng = np.random.default_rng(seed)

    def normal(*dims):
        return rng.normal(size=dims).astype(np.float32)

    groups = tuple(tuple(normal(*rows, D) for _ in range(count)) for count in counts)
    weights = tuple(normal(D) if has else None for has in weighted)
    return groups, weights, normal(D) if gain else None, normal(*rows, D), normal(*rows, D)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, groups, weights, gain, du, dn):
    (u, n), vjp = jax.vjp(lambda *a: function(*a), groups, weights, gain)
    return u, n, *vjp((du, dn))


def expected(groups, weights, gain, du, dn):
    options = {"eps": EPS, "scale": SCALE}
    gradients = reference.gradients(groups, weights, gain, du, dn, **options)
    return *reference.sum_norm(groups, weights, gain, **options), *gradients


def check(got, want, tolerance):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for i, (mine, theirs) in enumerate(pairs):
        error, size = np.abs(np.asarray(mine, np.float64) - theirs), np.abs(theirs).max()
        print(f"  {i}: error max {error.max():.1e}, mean {error.mean():.1e} of {size:.1e}")
        assert error.max() <= tolerance * size, i


@IMPLEMENTATIONS
class TestImplementation:
    @pytest.mark.parametrize("name", ["a sum and a gain", "a mix"])
    def test_more_results_have_their_cotangents(self, function, name):
        """n is used twice, u and the third n are not, and the first group's sum is used."""
        groups, weights, gain, dfirst, dn = draw(SHAPES[name])

        def used(groups, weights, gain):
            _, n, again, _, first = function(groups, weights, gain, uses=3, first=True)
            return n, again, first

        out, vjp = jax.vjp(used, groups, weights, gain)
        (dfirst_group, *dothers), *dvectors = vjp((dn, 2 * dn, dfirst))
        _, n, (first, *others), *vectors = expected(groups, weights, gain, 0 * dn, 3 * dn)
        check(out, (n, n, np.sum(np.float64(groups[0]), axis=0)), 2e-6)
        check(dfirst_group, [d + dfirst for d in first], 2e-6)
        check((dothers, dvectors), (others, vectors), 2e-6)

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_equals_the_definition(self, function, shape):
        arrays = draw(shape)
        check(value_and_gradients(function, *arrays), expected(*arrays), 2e-6)

    def test_bfloat16_is_rounded(self, function):
        groups, weights, gain, *cotangents = draw(SHAPES["a mix"])
        low = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), (groups, *cotangents))
        got = value_and_gradients(function, low[0], weights, gain, *low[1:])
        assert {leaf.dtype for leaf in jax.tree.leaves(got[:3])} == {jnp.dtype(jnp.bfloat16)}
        assert got[3][0].dtype == jnp.float32
        groups, *cotangents = jax.tree.map(partial(np.asarray, dtype=np.float64), low)
        check(got, expected(groups, weights, gain, *cotangents), 2**-7)

    def test_zero_rows(self, function):
        arrays = draw(SHAPES["a sum and a gain"])
        for x in arrays[0][0]:
            x[3] = 0
        got = value_and_gradients(function, *arrays)
        check(got[:2], expected(*arrays)[:2], 2e-6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))

    def test_vmap_and_checkpoint(self, function):
        groups, weights, gain, *cotangents = draw(SHAPES["a mix"])
        want = value_and_gradients(function, groups, weights, gain, *cotangents)
        again = value_and_gradients(jax.checkpoint(function), groups, weights, gain, *cotangents)
        mapped = jax.vmap(partial(value_and_gradients, function), (0, None, None, 0, 0))(
            groups, weights, gain, *cotangents
        )
        summed = (*mapped[:3], jax.tree.map(lambda d: d.sum(axis=0), mapped[3]), None)
        check(again, want, 1e-6)
        check(summed, want, 1e-5)


@pytest.mark.parametrize("width", [8, 2056, api.MOST])
def test_the_usual_block_sizes_serve_the_narrowest_and_the_widest_rows(width):
    arrays = draw(((5,), width, (2,), (True,), True))
    got = value_and_gradients(lambda *a: INTERPRETED(*a, EPS, SCALE), *arrays)
    check(got, expected(*arrays), 2e-6)


def test_the_written_gradients_are_those_of_the_definition():
    """By central differences in float64."""
    shape = (3,), 4, (2, 1, 0), (True, False, True), True
    *inputs, du, dn = jax.tree.map(np.float64, draw(shape))
    gradients = reference.gradients(*inputs, du, dn, eps=EPS, scale=SCALE)
    leaves, structure = jax.tree.flatten(tuple(inputs))
    for which, gradient in enumerate(jax.tree.leaves(gradients)):
        for index in np.ndindex(gradient.shape):

            def loss(change, which=which, index=index):
                changed = [leaf.copy() for leaf in leaves]
                changed[which][index] += change
                u, n = reference.sum_norm(
                    *jax.tree.unflatten(structure, changed), eps=EPS, scale=SCALE
                )
                return np.sum(u * du + n * dn)

            slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
            assert abs(slope - gradient[index]) < 1e-7


def test_gradients_are_of_two_kernels():
    arguments = [jax.ShapeDtypeStruct((8, 100, 768), jnp.bfloat16)] * 3
    arguments.append(jax.ShapeDtypeStruct((768,), jnp.float32))

    def loss(x, y, x0, a):
        u, n = api.sum_norm([[x, y], [x0]], [a, None], eps=EPS)
        return jnp.sum(u**2) + jnp.sum(n**3)

    kernels = kernels_of_gradients(loss, (0, 1, 2, 3), arguments)
    assert kernels == {"stream_forward": 1, "stream_backward": 1}


def test_a_small_case_equals_its_reference_and_xla(monkeypatch):
    (case,) = (case for case in specs.CASES if case.name == "quickstart")
    arguments = case.make(jax.random.key(0))
    error = np.abs(case.run(*arguments, implementation="xla") - case.reference(*arguments))
    assert error.max() < 1e-5
    monkeypatch.setattr(api, "check", lambda *_: None)
    monkeypatch.setattr(pallas_triton, "sum_norm", INTERPRETED)
    monkeypatch.setattr(dispatch, "pallas_triton", lambda *_: pallas_triton)
    assert parity.compare(case, "pallas_triton", jax.random.key(1), rows=64).problem == ""


@pytest.mark.parametrize(
    ("device", "width", "chosen"),
    [
        (Device("cpu", "cpu"), 512, "xla"),
        (H100, 768, "pallas_triton"),
        (H100, 100, "xla"),
        (H100, 8192, "xla"),
    ],
)
def test_choice(device, width, chosen, monkeypatch):
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: {})
    dtype = jnp.dtype(jnp.bfloat16)
    with dispatch.targeting(device):
        assert api.choose(dtype, width, None) == chosen
        if chosen == "xla":
            with pytest.raises(CannotServe, match="pallas_triton serves"):
                api.choose(dtype, width, "pallas_triton")
        table = {f"bfloat16_d{width}": {"implementation": "xla"}}
        monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table)
        assert api.choose(dtype, width, None) == "xla"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": [[]]}, "there are 1 groups and 1 weights; expected as many, with an array"),
        ({"weights": []}, "there are 1 groups and 0 weights"),
        ({"arrays": [[jnp.ones(4)]]}, "an array is float32 [4]; expected bfloat16 or float32"),
        ({"arrays": [[jnp.ones((2, 4)), jnp.ones((3, 4))]]}, "an array is float32 [3, 4]"),
        ({"gain": jnp.ones(3)}, "a weight is float32 [3]; expected float32 [4]"),
        ({"eps": 0.0}, "eps is 0.0; expected a number above 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"arrays": [[jnp.ones((2, 4))]], "weights": [None], "gain": None, "eps": EPS} | change
    with pytest.raises(ValueError) as caught:
        api.sum_norm(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
