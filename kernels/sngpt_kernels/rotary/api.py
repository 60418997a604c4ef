"""The public operation: it checks its arguments, chooses an implementation and calls it."""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import Device, describe
from sngpt_kernels.rotary import xla

Implementation = Literal["xla", "pallas_triton"]
OPERATION = "rotary.prepare"
MOST = 256  # the largest head that a program's registers hold


def tuned_entry(device: Device, dtype: jnp.dtype, head_size: int) -> dict[str, Any]:
    """The entry of these arguments in the device's table, or {}."""
    table = dispatch.tuned("sngpt_kernels.rotary", device.kind)
    return table.get(f"{dtype}_h{head_size}", {})


def prepare(
    x: Array,
    gain: Array,
    cos: Array,
    sin: Array,
    *,
    eps: float,
    values: tuple[int, ...] = (),
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """Queries and keys for attention: RMSNorm, rotary positions, and a gain of each query head.

    Each head is divided by sqrt(mean(x²) + eps). Then each pair (j, j + r/2) of its leading r
    dimensions is rotated (arXiv:2104.09864), and a query is multiplied by its head's gain.
    `pallas_triton` reads the heads once, computes in float32 and rounds once. Its gradient reads
    the heads and the two cotangents once. That gradient has no derivative. The operation works
    under jit, vmap, jax.checkpoint and inside jax.shard_map(check_vma=False).

    Args:
      x: the raw heads [B, T, H + K + V, h] of queries, keys, values, bfloat16 or float32.
      gain: [H], float32.
      cos, sin: [1 or B, T, r/2], float32, constants without a gradient.
      eps: added to the mean square, above 0. Static.
      values: the counts V of the last heads, which stay as they are; an array for each. Static.
      implementation: None chooses by the device that the code is traced for.

    Returns:
      Queries [B, T, H, h], keys [B, T, K, h] and values [B, T, V, h] in x's dtype.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    _check_arguments(x, gain, cos, sin, eps, values)
    if choose(x.dtype, x.shape[-1], implementation) == "xla":
        return xla.prepare(x, gain, cos, sin, eps, values)
    kernels = dispatch.pallas_triton("rotary", dispatch.current_device())
    prepared: tuple[Array, ...] = kernels.prepare(x, gain, cos, sin, eps, values)
    return prepared


def _check_arguments(
    x: Array, gain: Array, cos: Array, sin: Array, eps: float, values: tuple[int, ...]
) -> None:
    if x.ndim != 4 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {describe(x)}; expected bfloat16 or float32 [B, T, H + K, h]")
    B, T, N, h = x.shape
    if gain.ndim != 1 or not 0 < gain.shape[0] <= N or gain.dtype != jnp.float32:
        raise ValueError(f"gain is {describe(gain)}; expected float32 [H], H at most {N}")
    half = cos.shape[-1] if cos.ndim == 3 else 0
    if not 0 < 2 * half <= h or cos.shape not in ((1, T, half), (B, T, half)):
        raise ValueError(f"cos is {describe(cos)}; expected [1 or {B}, {T}, at most {h // 2}]")
    if sin.shape != cos.shape:
        raise ValueError(f"sin is {describe(sin)}; expected {describe(cos)}, as cos")
    most = N - gain.shape[0] - 1  # one head of keys is left
    if sum(values) > most or min(values, default=1) < 1:
        heads = f"counts above 0 of at most {most} heads in all, and a head of keys beside them"
        raise ValueError(f"values is {values}; expected {heads}")
    if not eps > 0:
        raise ValueError(f"eps is {eps!r}; expected a number above 0")


def choose(dtype: jnp.dtype, head_size: int, implementation: Implementation | None) -> str:
    """The implementation that `prepare` takes, here and now, and logs with its reason.

    Raises CannotServe, with the reason, if the named implementation cannot serve.
    """
    device = dispatch.current_device()
    return dispatch.kernel_or_xla(
        OPERATION,
        implementation,
        functools.partial(dispatch.check_heads, "rotary", device, head_size, MOST),
        tuned_entry(device, dtype, head_size),
        f"{dtype}, head size {head_size}",
    )
