"""The public operation: it checks its arguments, chooses an implementation and calls it."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device, describe
from sngpt_kernels.epilogue import api as epilogue
from sngpt_kernels.xsa import xla

Implementation = Literal["xla", "cudnn", "pallas_triton", "tokamax", "fa4_jax"]

LIBRARIES = ("tokamax", "fa4_jax")  # of other authors, installed apart

# xla may store so many bytes of float32 scores if a kernel could do without them
SCORES_BYTES = 2**30


def tuned_entry(device: Device, dtype: jnp.dtype, length: int, head_size: int) -> dict[str, Any]:
    """The entry of these arguments in the device's table, or {}."""
    rounded = 1 << (length - 1).bit_length()
    table = dispatch.tuned("sngpt_kernels.xsa", device.kind)
    return table.get(f"{dtype}_t{rounded}_h{head_size}", {})


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    exclusive: bool,
    scale: float,
    gate: epilogue.Gate | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Causal softmax(scale · q kᵀ) v, without the position's own value if `exclusive`.

    Query head i uses key/value head ⌊i · K / H⌋ (grouped-query attention, arXiv:2305.13245).
    `epilogue.api.finish` defines the exclusion and the gate, and chooses for itself unless `xla` is
    named. The exclusion and the softmax are float32. The operation works under jit, vmap,
    jax.checkpoint and inside jax.shard_map(check_vma=False). The gradients of the kernels have no
    derivative.

    `xla` stores the scores [B, H, T, T], the others nothing of size T².

    Args:
      q: [B, T, H, h], bfloat16 or float32.
      k: [B, T, K, h] in q's dtype, K a divisor of H.
      v: like k.
      exclusive: whether to remove the direction of a position's own value. Static.
      scale: of the products q kᵀ, above 0. Static.
      gate: of each head's output: logits [B, T, H] in q's dtype and bias [H] float32.
      implementation: None chooses by the device that the code is traced for.

    Returns:
      [B, T, H, h] in q's dtype.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    dispatch.check_name(implementation, get_args(Implementation))
    _check_arguments(q, k, v, scale)
    device = dispatch.current_device()
    chosen, reason = implementation or "", "as asked"
    if chosen:
        check(chosen, device, q)
    else:
        chosen, reason = choose(device, q)
    dispatch.announce("attention", chosen, reason)
    if chosen == "pallas_triton":
        y = dispatch.pallas_triton("xsa", device).attention(q, k, v, scale)
    elif chosen == "cudnn":
        y = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation="cudnn"
        )
    elif chosen in LIBRARIES:
        y = dispatch.backend("xsa", "libraries").attention(chosen, q, k, v, scale)
    else:
        y = xla.causal_attention(q, k, v, scale)
    named: epilogue.Implementation | None = "xla" if implementation == "xla" else None
    return epilogue.finish(y, v if exclusive else None, gate, implementation=named)


def _check_arguments(q: Array, k: Array, v: Array, scale: float) -> None:
    if q.ndim != 4 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q is {describe(q)}; expected bfloat16 or float32 [B, T, H, h]")
    B, T, H, h = q.shape
    K = k.shape[2] if k.ndim == 4 else 0
    if K == 0 or H % K or k.shape != (B, T, K, h) or k.dtype != q.dtype:
        expected = f"{q.dtype} [{B}, {T}, K, {h}] with K a divisor of {H}, as q is {list(q.shape)}"
        raise ValueError(f"k is {describe(k)}; expected {expected}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v is {describe(v)}; expected {describe(k)}, as k")
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale!r}; expected a number above 0")


def check(implementation: Implementation, device: Device, q: Array) -> None:
    """Raises CannotServe, with the reason, if the implementation cannot serve q on that device."""
    if implementation == "xla":
        return
    dispatch.check_nvidia(implementation, device)
    if implementation != "pallas_triton" and q.dtype != jnp.bfloat16:
        raise CannotServe(f"{implementation} serves bfloat16; q is {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        served = f"{implementation} serves head sizes of 8, 16, … 128"
        raise CannotServe(f"{served}; q has {q.shape[-1]}")
    if implementation == "pallas_triton":
        dispatch.pallas_triton("xsa", device)
    elif implementation in LIBRARIES:
        dispatch.check_trusted(implementation, "xsa")
        dispatch.backend("xsa", "libraries").check(implementation, device)


def choose(device: Device, q: Array) -> tuple[Implementation, str]:
    """The implementation for q [B, T, H, h] on that device, and the reason."""
    B, T, H, h = q.shape
    scores = 4 * B * H * T * T
    cannot: dict[Implementation, str] = {}
    for implementation in get_args(Implementation):
        try:
            check(implementation, device, q)
        except CannotServe as error:
            cannot[implementation] = str(error)
    fastest = tuned_entry(device, q.dtype, T, h).get("implementation")
    if fastest and fastest not in cannot and not (fastest == "xla" and scores > SCORES_BYTES):
        arguments = f"{q.dtype}, head size {h}, about {T} positions"
        return fastest, f"the fastest measured on {device.kind}, {arguments}"
    if "cudnn" not in cannot:
        return "cudnn", f"{q.dtype} on an NVIDIA GPU, where no measurement says another"
    if scores <= SCORES_BYTES:
        return "xla", cannot["cudnn"]
    if "pallas_triton" not in cannot:
        stored = f"xla would store {scores / 2**30:.1f} GiB of scores"
        return "pallas_triton", f"{cannot['cudnn']}; {stored}"
    return "xla", f"{cannot['cudnn']}; {cannot['pallas_triton']}"
