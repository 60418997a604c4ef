"""The public operation: it checks its arguments, chooses an implementation and calls it."""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import Device, describe
from sngpt_kernels.epilogue import xla

Implementation = Literal["xla", "pallas_triton"]
Gate = tuple[Array, Array]
OPERATION = "epilogue.finish"
MOST = 256  # the largest head that a program's registers hold


def tuned_entry(
    device: Device, dtype: jnp.dtype, head_size: int, exclusive: bool, gated: bool
) -> dict[str, Any]:
    """The entry of these arguments in the device's table, or {}."""
    key = f"{dtype}_h{head_size}{'_exclusive' * exclusive}{'_gated' * gated}"
    return dispatch.tuned("sngpt_kernels.epilogue", device.kind).get(key, {})


def finish(
    y: Array,
    v: Array | None = None,
    gate: Gate | None = None,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """Attention's output without each position's own value, and times a gate per head.

    With `v`, head i gives up the direction of value head ⌊i · K / H⌋ at its position:
    y - (⟨y, v⟩ / max(|v|², 1e-24)) v (XSA, arXiv:2603.09078). Then `gate` multiplies each head by
    sigmoid(logits + bias) (arXiv:2505.06708). `pallas_triton` reads y and v once, computes in
    float32 and rounds once. Its gradient reads them and the cotangent once, and has no derivative.
    The operation works under jit, vmap, jax.checkpoint and inside jax.shard_map(check_vma=False).

    Args:
      y: [B, T, H, h], bfloat16 or float32.
      v: [B, T, K, h] in y's dtype, K a divisor of H; None leaves the exclusion out.
      gate: logits [B, T, H] in y's dtype and bias [H] float32; None leaves the gate out.
      implementation: None chooses by the device that the code is traced for.

    Returns:
      [B, T, H, h] in y's dtype; y itself without `v` and `gate`.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    _check_arguments(y, v, gate)
    if v is None and gate is None:
        return y
    device, h = dispatch.current_device(), y.shape[-1]
    chosen = dispatch.kernel_or_xla(
        OPERATION,
        implementation,
        functools.partial(dispatch.check_heads, "epilogue", device, h, MOST),
        tuned_entry(device, y.dtype, h, v is not None, gate is not None),
        f"{y.dtype}, head size {h}",
    )
    if chosen == "xla":
        return xla.finish(y, v, gate)
    return dispatch.pallas_triton("epilogue", device).finish(y, v, gate)


def _check_arguments(y: Array, v: Array | None, gate: Gate | None) -> None:
    if y.ndim != 4 or y.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"y is {describe(y)}; expected bfloat16 or float32 [B, T, H, h]")
    B, T, H, h = y.shape
    K = v.shape[2] if v is not None and v.ndim == 4 else 0
    if v is not None and (not K or H % K or v.shape != (B, T, K, h) or v.dtype != y.dtype):
        expected = f"{y.dtype} [{B}, {T}, K, {h}] with K a divisor of {H}, as y is {list(y.shape)}"
        raise ValueError(f"v is {describe(v)}; expected {expected}")
    if gate is None:
        return
    logits, bias = gate
    if logits.shape != (B, T, H) or logits.dtype != y.dtype:
        raise ValueError(f"logits are {describe(logits)}; expected {y.dtype} [{B}, {T}, {H}]")
    if bias.shape != (H,) or bias.dtype != jnp.float32:
        raise ValueError(f"bias is {describe(bias)}; expected float32 [{H}]")
