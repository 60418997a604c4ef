"""The public operation: it checks its arguments, chooses an implementation and calls it."""

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

# It is imported by name, so that a bundled program can do without it and run the others.
PALLAS_TRITON = "sngpt_kernels.xsa.pallas_triton"
# xla may store so many bytes of float32 scores if a kernel could do without them
SCORES_BYTES = 2**30


def table_key(dtype: jnp.dtype, length: int, head_size: int, exclusive: bool) -> str:
    """The key of these arguments in the table `tuned/<device>.json`.

    The entry is {"implementation": the fastest one, "config": its block sizes}. `length` T is
    rounded up to a power of two.
    """
    rounded = 1 << (length - 1).bit_length()
    return f"{dtype}_t{rounded}_h{head_size}{'_exclusive' * exclusive}"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    exclusive: bool,
    scale: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal softmax(scale · q kᵀ) v, without the position's own value if `exclusive`.

    Query head i uses key/value head ⌊i · K / H⌋ (grouped-query attention, arXiv:2305.13245).
    Exclusive self-attention (XSA, arXiv:2603.09078) is y - ⟨y, v̂⟩ v̂ with
    v̂ = v / max(|v|, 1e-12), for v of the same position and key/value head. The softmax and the
    exclusion are float32. The operation is differentiable in q, k and v. It works under jit, vmap,
    jax.checkpoint and inside jax.shard_map(check_vma=False). The gradients of `pallas_triton` have
    no derivative.

    Args:
      q: [B, T, H, h], bfloat16 or float32.
      k: [B, T, K, h] in q's dtype, K a divisor of H.
      v: like k.
      exclusive: whether to remove the direction of a position's own value. Static.
      scale: of the products q kᵀ, above 0. Static.
      implementation: None chooses by the device that the code is traced for, from its table in
        `tuned` if there is an entry, and logs the choice once.

    Returns:
      [B, T, H, h] in q's dtype.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        expected = f"one of {', '.join(get_args(Implementation))}, or None"
        raise ValueError(f"implementation is {implementation!r}; expected {expected}")
    _check(q, k, v, scale)
    device = dispatch.current_device()
    if implementation:
        check(implementation, device, q)
        chosen, reason = implementation, "as asked"
    else:
        chosen, reason = choose(device, q, exclusive)
    dispatch.announce("xsa.attention" if exclusive else "attention", chosen, reason)
    if chosen == "pallas_triton":
        return importlib.import_module(PALLAS_TRITON).attention(q, k, v, exclusive, scale)
    return (cudnn if chosen == "cudnn" else xla).attention(q, k, v, exclusive, scale)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
    found = {
        name: f"{name} is {a.dtype} {list(a.shape)}" for name, a in [("q", q), ("k", k), ("v", v)]
    }
    if q.ndim != 4 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{found['q']}; expected bfloat16 or float32 [B, T, H, h]")
    B, T, H, h = q.shape
    K = k.shape[2] if k.ndim == 4 else 0
    if K == 0 or H % K or k.shape != (B, T, K, h) or k.dtype != q.dtype:
        expected = f"{q.dtype} [{B}, {T}, K, {h}] with K a divisor of {H}, as q is {list(q.shape)}"
        raise ValueError(f"{found['k']}; expected {expected}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"{found['v']}; expected {k.dtype} {list(k.shape)}, as k")
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale!r}; expected a number above 0")


def check(implementation: Implementation, device: Device, q: jax.Array) -> None:
    """Raises CannotServe, with the reason, if the implementation cannot serve q on that device."""
    if implementation == "cudnn":
        cudnn.check(device, q.dtype, q.shape[-1])
    if implementation == "pallas_triton":
        dispatch.check_nvidia("pallas_triton", device)
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            served = "pallas_triton serves head sizes of 8, 16, … 128"
            raise CannotServe(f"{served}; q has {q.shape[-1]}")
        if importlib.util.find_spec(PALLAS_TRITON) is None:
            raise CannotServe("pallas_triton is no part of this program")


def choose(device: Device, q: jax.Array, exclusive: bool) -> tuple[Implementation, str]:
    """The implementation for q [B, T, H, h] on that device, and the reason."""
    B, T, H, h = q.shape
    scores = 4 * B * H * T * T
    cannot: dict[Implementation, str] = {}
    for implementation in get_args(Implementation):
        try:
            check(implementation, device, q)
        except CannotServe as error:
            cannot[implementation] = str(error)
    table = dispatch.tuned("sngpt_kernels.xsa", device.kind)
    fastest = table.get(table_key(q.dtype, T, h, exclusive), {}).get("implementation")
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
    return "xla", "; ".join(cannot.values())
