"""The public operation: checks its arguments, chooses the implementation and calls it."""

import importlib
import importlib.util
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.xsa import cudnn, xla

Implementation = Literal["xla", "cudnn", "pallas_triton"]

# imported by name: a program bundled without it runs the others
PALLAS_TRITON = "sngpt_kernels.xsa.pallas_triton"
SCORES_BYTES = 2**30  # the float32 scores that xla may materialize where a kernel could do without


def table_key(dtype: jnp.dtype, length: int, head_size: int, exclusive: bool) -> str:
    """The entry of `tuned/<device>.json` for such arguments: {"implementation": its fastest,
    "config": block sizes}.

    `length` T counts in powers of two.
    """
    return f"{dtype}_t{1 << (length - 1).bit_length()}_h{head_size}" + (
        "_exclusive" if exclusive else ""
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    exclusive: bool,
    scale: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal softmax(scale · q kᵀ) v, without the direction of the position's own value where
    `exclusive`.

    Query head i uses key/value head ⌊i · K / H⌋ (grouped-query attention, arXiv:2305.13245).
    Exclusive self-attention (XSA, arXiv:2603.09078): y - ⟨y, v̂⟩ v̂ with v̂ = v / max(|v|, 1e-12),
    v of the same position and key/value head. The softmax and the exclusion are float32.
    Differentiable in q, k and v; works under jit, vmap, jax.checkpoint and inside
    jax.shard_map(check_vma=False). The gradients of `pallas_triton` have no derivative themselves.

    Args:
      q: [B, T, H, h], bfloat16 or float32.
      k: [B, T, K, h] in q's dtype, K a divisor of H.
      v: as k.
      exclusive: whether a position's own value is excluded. Static.
      scale: of the products q kᵀ, above 0. Static.
      implementation: None chooses by the device that the code is traced for, from its table in `tuned` where there is an
        entry, and says so once in the log.

    Returns:
      [B, T, H, h] in q's dtype.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the implementation asked for does not serve these arguments on this device.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation is {implementation!r}; expected one of"
            f" {', '.join(get_args(Implementation))}, or None"
        )
    _check(q, k, v, scale)
    chosen, reason = (
        (implementation, "as asked")
        if implementation
        else choose(dispatch.current_device(), q, exclusive)
    )
    if implementation:
        check(implementation, dispatch.current_device(), q)
    dispatch.announce("xsa.attention" if exclusive else "attention", chosen, reason)
    if chosen == "pallas_triton":
        return importlib.import_module(PALLAS_TRITON).attention(q, k, v, exclusive, scale)
    return (cudnn if chosen == "cudnn" else xla).attention(q, k, v, exclusive, scale)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
    if q.ndim != 4 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)}; expected bfloat16 or float32 [B, T, H, h]"
        )
    B, T, H, h = q.shape
    K = k.shape[2] if k.ndim == 4 else 0
    if K == 0 or H % K or k.shape != (B, T, K, h) or k.dtype != q.dtype:
        expected = f"{q.dtype} [{B}, {T}, K, {h}] with K a divisor of {H}, as q is {list(q.shape)}"
        raise ValueError(f"k is {k.dtype} {list(k.shape)}; expected {expected}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(
            f"v is {v.dtype} {list(v.shape)}; expected {k.dtype} {list(k.shape)}, as k"
        )
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale!r}; expected a number above 0")


def check(implementation: Implementation, device: Device, q: jax.Array) -> None:
    """Raises CannotServe, with the reason, where the implementation is not made for q on that
    device.
    """
    if implementation == "cudnn":
        cudnn.check(device, q.dtype, q.shape[-1])
    if implementation == "pallas_triton":
        dispatch.check_nvidia("pallas_triton", device)
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            raise CannotServe(
                f"pallas_triton serves head sizes of 8, 16, … 128; q has {q.shape[-1]}"
            )
        if importlib.util.find_spec(PALLAS_TRITON) is None:
            raise CannotServe("pallas_triton is no part of this program")


def choose(device: Device, q: jax.Array, exclusive: bool) -> tuple[Implementation, str]:
    """The implementation for q [B, T, H, h] on that device, and why."""
    B, T, H, h = q.shape
    scores = 4 * B * H * T * T
    cannot: dict[Implementation, str] = {}
    for implementation in get_args(Implementation):
        try:
            check(implementation, device, q)
        except CannotServe as error:
            cannot[implementation] = str(error)
    measured = (
        dispatch.tuned("sngpt_kernels.xsa", device.kind)
        .get(table_key(q.dtype, T, h, exclusive), {})
        .get("implementation")
    )
    if measured and measured not in cannot and not (measured == "xla" and scores > SCORES_BYTES):
        return (
            measured,
            f"the fastest measured on {device.kind}, {q.dtype}, head size {h}, about {T} positions",
        )
    if "cudnn" not in cannot:
        return "cudnn", f"{q.dtype} on an NVIDIA GPU, where no measurement says another"
    if scores <= SCORES_BYTES:
        return "xla", cannot["cudnn"]
    if "pallas_triton" not in cannot:
        return (
            "pallas_triton",
            f"{cannot['cudnn']}; xla would store {scores / 2**30:.1f} GiB of scores",
        )
    return "xla", "; ".join(cannot.values())
