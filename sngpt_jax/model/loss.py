"""Cross-entropy of the tied head, from all logits at once or in chunks of tokens.

All float32 logits of N tokens take 4NV bytes, and their gradient as many: 6.6 GB each at V = 50,304
and 32,768 tokens per microbatch. In chunks of 4,096 tokens the logits take 824 MB.

The loss ends the forward pass, so its gradient is known there up to one scalar. `mean_loss`
therefore computes both gradients of a chunk while its logits exist, and keeps them (dx is as large
as x, dtable as the table) until that scalar arrives; no backward pass recomputes the logits. This
is the method of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989. Each
chunk also reads and writes dtable in float32, so chunks should not be small.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def logits(x_BTD: jax.Array, table_VD: jax.Array, cap: float) -> jax.Array:
    """Logits [B, T, V], float32, and with a cap > 0: cap · tanh(logits / cap).

    The table is cast to x's dtype. The soft cap is Gemma 2's, arXiv:2408.00118.
    """
    logits_BTV = jnp.einsum(
        "btd,vd->btv", x_BTD, table_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32
    )
    return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV


def token_losses(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, cap: float, chunk: int
) -> jax.Array:
    """Cross-entropy per token in nats, float32 [B, T], differentiable.

    At most `chunk` tokens' logits exist at a time (0: all); a backward pass recomputes them.
    """
    if not chunk:
        logits_BTV = logits(x_BTD, table_VD, cap)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    weights_VD = table_VD.astype(x_BTD.dtype)

    @jax.checkpoint  # otherwise the gradient would keep every chunk's logits
    def of_chunk(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_1CD, targets_1C = batch
        return token_losses(x_1CD, weights_VD, targets_1C, cap=cap, chunk=0)

    return _in_chunks(of_chunk, (x_BTD, targets_BT), chunk)


def token_readings(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    hints_BT: jax.Array,
    readings: tuple[str, ...],
    *,
    cap: float,
    chunk: int,
) -> dict[str, jax.Array]:
    """The named readings of each token's distribution p, [B, T]; logits as in `token_losses`.

    nll: -ln p(target); greedy: whether the target is the likeliest token; entropy: of p in nats;
    mass: Σ p; hint_nll: -ln p(hint). All are float32, except greedy.
    """
    weights_VD = table_VD.astype(x_BTD.dtype)

    def of_chunk(batch: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, jax.Array]:
        x_BCD, targets_BC, hints_BC = batch
        logits_BCV = logits(x_BCD, weights_VD, cap)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)

        def nll(ids_BC: jax.Array) -> jax.Array:
            return log_z_BC - jnp.take_along_axis(logits_BCV, ids_BC[..., None], axis=-1)[..., 0]

        p_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        known = {
            "nll": lambda: nll(targets_BC),
            "greedy": lambda: jnp.argmax(logits_BCV, axis=-1) == targets_BC,
            "entropy": lambda: log_z_BC - jnp.sum(p_BCV * logits_BCV, axis=-1),
            "mass": lambda: jnp.sum(p_BCV, axis=-1),
            "hint_nll": lambda: nll(hints_BC),
        }
        return {name: known[name]() for name in readings}

    batch = (x_BTD, targets_BT, hints_BT)
    return _in_chunks(of_chunk, batch, chunk) if chunk else of_chunk(batch)


def mean_loss(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, cap: float, chunk: int
) -> jax.Array:
    """The mean of `token_losses`, a float32 scalar, differentiable in reverse mode.

    The gradients' products have x's dtype and accumulate in float32, over the chunks too; dx is
    rounded once.
    """
    return _mean(cap, chunk or targets_BT.size, x_BTD, table_VD, targets_BT)


def _chunks(values_BT: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] as [n, 1, C, ...]: the fewest chunks of equal size C ≤ `chunk`, zero-padded."""
    tokens = values_BT.shape[0] * values_BT.shape[1]
    count = -(-tokens // chunk)
    size = -(-tokens // count)
    flat = values_BT.reshape(tokens, *values_BT.shape[2:])
    padded = jnp.pad(flat, [(0, count * size - tokens)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(count, 1, size, *flat.shape[1:])


def _in_chunks(function: Callable[[Any], Any], batch: tuple[jax.Array, ...], chunk: int) -> Any:
    """`function` of every chunk of the arrays [B, T, ...], one after the other, as [B, T]."""
    shape = batch[0].shape[:2]
    found = jax.lax.map(function, tuple(_chunks(values, chunk) for values in batch))
    return jax.tree.map(lambda x_n1C: x_n1C.reshape(-1)[: math.prod(shape)].reshape(shape), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mean(
    cap: float, chunk: int, x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    return jnp.mean(token_losses(x_BTD, table_VD, targets_BT, cap=cap, chunk=chunk))


def _mean_and_gradients(
    cap: float, chunk: int, x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    tokens, weights_VD = targets_BT.size, table_VD.astype(x_BTD.dtype)

    def of_chunk(
        carry: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, ...]
    ) -> tuple[Any, jax.Array]:
        total, dtable_DV = carry
        x_CD, targets_C, real_C = (values[0] for values in batch)
        logits_CV = logits(x_CD[None], weights_VD, cap)[0]
        # capped logits need no shift by the largest one: 2^16 times exp(64) is a finite float32
        shifted = not 0 < cap <= 64
        shift_C1 = jnp.max(logits_CV, axis=-1, keepdims=True) if shifted else 0.0
        e_CV = jnp.exp(logits_CV - shift_C1)
        sum_C1 = jnp.sum(e_CV, axis=-1, keepdims=True)
        # compared in place: a one-hot array or a scatter would be another pass over V
        hit_CV = jax.lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1) == targets_C[:, None]
        if shifted:  # a GPU joins no other sum with that of the shifted ones
            target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        else:
            target_C = jnp.sum(logits_CV, axis=-1, where=hit_CV)
        losses_C = (jnp.log(sum_C1) + shift_C1)[:, 0] - target_C
        d_CV = e_CV * (1.0 / sum_C1)
        d_CV = jnp.where(hit_CV, d_CV - 1.0, d_CV)
        if cap:
            d_CV *= 1.0 - jnp.square(logits_CV / cap)  # the derivative of the cap, from its value
        d_CV = jnp.where(real_C[:, None], d_CV, 0.0).astype(x_CD.dtype)
        dx_CD = jnp.einsum("cv,vd->cd", d_CV, weights_VD, preferred_element_type=jnp.float32)
        # x is transposed, not d: a CPU copies what is transposed, and d is larger
        dtable_DV += jnp.einsum("dc,cv->dv", x_CD.T, d_CV, preferred_element_type=jnp.float32)
        total += jnp.sum(losses_C, where=real_C)
        return (total, dtable_DV), (dx_CD / tokens).astype(x_CD.dtype)

    real_BT = jnp.ones(targets_BT.shape, bool)
    batches = tuple(_chunks(values, chunk) for values in (x_BTD, targets_BT, real_BT))
    carry = (jnp.zeros(()), jnp.zeros(table_VD.shape[::-1], jnp.float32))
    if chunk >= tokens:
        carry, dx = of_chunk(carry, jax.tree.map(lambda values: values[0], batches))
    else:
        carry, dx = jax.lax.scan(of_chunk, carry, batches)
    total, dtable_DV = carry
    dx_BTD = dx.reshape(-1, x_BTD.shape[-1])[:tokens].reshape(x_BTD.shape)
    return total / tokens, (dx_BTD, (dtable_DV.T / tokens).astype(table_VD.dtype))


def _scale_gradients(
    cap: float, chunk: int, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    dx_BTD, dtable_VD = gradients
    scaled = (cotangent * dx_BTD).astype(dx_BTD.dtype)
    return scaled, cotangent.astype(dtable_VD.dtype) * dtable_VD, None


_mean.defvjp(_mean_and_gradients, _scale_gradients)
