"""The head's cross-entropy, whole and in chunks: values, gradients, precision and memory."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.model.loss import logits, mean_loss, token_losses, token_readings
from tests.oracles import check

B, T, D, V = 3, 7, 8, 29


def arrays(seed=0, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x, table = rng.normal(size=(B, T, D)), scale * rng.normal(size=(V, D))
    return x.astype(dtype), table.astype(dtype), rng.integers(0, V, (B, T))


def numpy_losses(x, table, targets, cap):
    z = x @ table.T
    z = cap * np.tanh(z / cap) if cap else z
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def value_and_grad(x, table, targets, cap, chunk):
    loss = functools.partial(mean_loss, cap=cap, chunk=chunk)
    return jax.value_and_grad(loss, argnums=(0, 1))(x, table, targets)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_logits_are_the_capped_product_with_the_table(cap):
    x, table, _ = arrays()
    want = x.astype(np.float64) @ table.astype(np.float64).T
    want = cap * np.tanh(want / cap) if cap else want
    np.testing.assert_allclose(logits(x, table, cap), want, rtol=0, atol=1e-5)
    assert logits(jnp.asarray(x, jnp.bfloat16), table, cap).dtype == jnp.float32


# of the 21 tokens: all at once, all in one chunk, equal chunks, an incomplete last one, one that
# minimal padding evens out
@pytest.mark.parametrize("chunk", [0, 21, 1000, 7, 1, 4, 15])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_values_and_gradients(cap, chunk):
    x, table, targets = arrays()
    oracle = functools.partial(numpy_losses, targets=targets, cap=cap)
    options = {"targets_BT": targets, "cap": cap, "chunk": chunk}
    check(functools.partial(token_losses, **options), oracle, x, table)
    of_all = functools.partial(mean_loss, **options)
    check(of_all, lambda x, table: np.asarray(oracle(x, table).mean()), x, table)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_chunks_change_nothing_but_rounding(cap):
    x, table, targets = arrays(seed=1)
    loss, grads = value_and_grad(x, table, targets, cap, 0)
    for chunk in (4, 21):
        chunked, chunked_grads = value_and_grad(x, table, targets, cap, chunk)
        np.testing.assert_allclose(chunked, loss, rtol=1e-6)
        undifferentiated = mean_loss(x, table, targets, cap=cap, chunk=chunk)
        np.testing.assert_allclose(undifferentiated, loss, rtol=1e-6)
        for got, want in zip(chunked_grads, grads, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_bfloat16_is_as_exact_as_the_plain_form(cap):
    """Over so many tokens that a mean or a sum over chunks in bfloat16 would be seen."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(4, 128, 32)), jnp.bfloat16)
    table = jnp.asarray(0.3 * rng.normal(size=(61, 32)), jnp.float32)
    targets = rng.integers(0, 61, (4, 128))
    rounded = table.astype(jnp.bfloat16).astype(jnp.float32)
    exact, exact_grads = value_and_grad(x.astype(jnp.float32), rounded, targets, cap, 0)
    loss, grads = value_and_grad(x, table, targets, cap, 24)

    def plain(x, table):
        return jnp.mean(token_losses(x, table, targets, cap=cap, chunk=0))

    plain_loss, plain_grads = jax.value_and_grad(plain, argnums=(0, 1))(x, table)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    for got, plain, want in zip(grads, plain_grads, exact_grads, strict=True):
        got, plain, want = (np.asarray(g, np.float64) for g in (got, plain, want))
        error, plain_error = (np.linalg.norm(g - want) / np.linalg.norm(want) for g in (got, plain))
        assert error < 4e-3  # half a unit in the last place of bfloat16 is 2e-3 to 4e-3
        assert error < 1.5 * plain_error + 1e-3
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_gradients_follow_the_cotangent(chunk):
    x, table, targets = arrays()
    tripled = jax.grad(
        lambda x, table: 3 * mean_loss(x, table, targets, cap=3.0, chunk=chunk), argnums=(0, 1)
    )(x, table)
    for got, want in zip(tripled, value_and_grad(x, table, targets, 3.0, chunk)[1], strict=True):
        np.testing.assert_allclose(got, 3 * want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_extreme_logits_stay_finite(cap):
    x, table, targets = arrays(scale=1e4)
    loss, grads = value_and_grad(x, table, targets, cap, 4)
    want = numpy_losses(x.astype(np.float64), table.astype(np.float64), targets, cap).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert want > (1e4 if not cap else 10)
    for got, plain in zip(grads, value_and_grad(x, table, targets, cap, 0)[1], strict=True):
        assert np.all(np.isfinite(got))
        # where the cap saturates, its derivative is the rounding of 1 - tanh²
        np.testing.assert_allclose(got, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("chunk", [0, 21, 7, 4, 15])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_readings_of_each_distribution(cap, chunk):
    x, table, targets = arrays()
    hints = np.random.default_rng(9).integers(0, V, (B, T))
    oracle = functools.partial(numpy_losses, np.float64(x), table, cap=cap)
    log_p = -np.stack([oracle(targets=np.full((B, T), v)) for v in range(V)], -1)
    want = {
        "nll": oracle(targets=targets),
        "greedy": log_p.argmax(-1) == targets,
        "entropy": -np.sum(np.exp(log_p) * log_p, -1),
        "mass": np.ones((B, T)),
        "hint_nll": oracle(targets=hints),
    }
    readings = functools.partial(token_readings, readings=tuple(want), cap=cap, chunk=chunk)
    found = jax.jit(readings)(x, table, targets, hints)
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def sizes(jaxpr):
    """Elements of every value that a program makes, those of its loops' bodies included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("differentiated", [False, True])
def test_logits_of_all_tokens_never_exist(differentiated):
    # the head is the widest part by far: 56 tokens of 8 numbers, a table of 8000, logits of 56,000
    rows, V = 8, 1000
    x, table, targets = jnp.ones((rows, T, D)), jnp.ones((V, D)), jnp.zeros((rows, T), int)

    def largest(function, chunk):
        def scalar(x, table):
            return jnp.sum(function(x, table, targets, cap=3.0, chunk=chunk))

        program = jax.value_and_grad(scalar, argnums=(0, 1)) if differentiated else scalar
        return max(sizes(jax.make_jaxpr(program)(x, table).jaxpr))

    for function in (mean_loss, token_losses):
        assert largest(function, 0) == rows * T * V
        assert largest(function, 16) == 14 * V  # 56 tokens in 4 equal chunks


def test_the_backward_pass_recomputes_no_logits():
    """Three products with the table, as in the plain form."""
    x, table, targets = arrays()

    def products(chunk):
        gradient = jax.grad(
            lambda x, table: mean_loss(x, table, targets, cap=3.0, chunk=chunk), argnums=(0, 1)
        )
        return str(jax.make_jaxpr(gradient)(x, table)).count(" dot_general[")

    assert products(4) == products(0) == 3


def test_inside_scan_checkpoint_and_shard_map():
    """As a training step has it, and under rematerialization."""
    rng = np.random.default_rng(3)
    x, table = (np.float32(rng.normal(size=shape)) for shape in ((2, 16, T, D), (V, D)))
    targets = rng.integers(0, V, (2, 16, T))
    mesh = make_mesh()
    rows = P(None, ("data", "fsdp"))

    def local(x, table, targets):
        @jax.checkpoint
        def loss(table, x, targets):
            return mean_loss(jnp.sin(x), table, targets, cap=3.0, chunk=5)

        def microbatch(total, batch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(table, *batch)), None

        total, _ = jax.lax.scan(microbatch, (jnp.zeros(()), jnp.zeros_like(table)), (x, targets))
        return jax.lax.pmean(jax.tree.map(lambda t: t / len(x), total), ("data", "fsdp"))

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, P(), rows), out_specs=P(), check_vma=False
    )
    loss, grad = jax.jit(step)(x, table, targets)
    whole = (jnp.sin(x).reshape(-1, T, D), table, targets.reshape(-1, T))
    want, (_, want_grad) = value_and_grad(*whole, 3.0, 0)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-6 * np.abs(want_grad).max())
