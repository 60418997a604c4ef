"""The public operation: it checks its arguments, chooses an implementation and calls it."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device, describe
from sngpt_kernels.stream import xla

Implementation = Literal["xla", "pallas_triton"]
OPERATION = "stream.sum_norm"
MOST = 4096  # the widest row of which a program's registers hold a float32 tile


def tuned_entry(device: Device, dtype: jnp.dtype, width: int) -> dict[str, Any]:
    """The entry of these arguments in the device's table, or {}."""
    return dispatch.tuned("sngpt_kernels.stream", device.kind).get(f"{dtype}_d{width}", {})


def sum_norm(
    arrays: Sequence[Sequence[Array]],
    weights: Sequence[Array | None],
    gain: Array | None = None,
    *,
    eps: float,
    scale: float = 1.0,
    uses: int = 1,
    first: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """u = Σᵢ wᵢ ⊙ Σⱼ xᵢⱼ, and its RMSNorm n = scale · gain ⊙ u / sqrt(mean(u²) + eps).

    Both kernels read each array once, compute in float32 and round once. n is computed from the
    rounded u. The gradient has no derivative. The operation works under jit, vmap, jax.checkpoint
    and inside jax.shard_map(check_vma=False).

    Args:
      arrays: groups of arrays [..., D] of one shape, bfloat16 or float32. The first group has an
        array. The sum of an empty group is 1, so its weight is a bias.
      weights: of each group a vector [D], float32, or None, which is 1 and has no gradient.
      gain: [D], float32, or None, which is 1.
      eps: added to the mean square, above 0. Static.
      scale: static.
      uses: how often n is returned. The kernel adds the gradients of uses of their own, which
        spares a pass over memory. Static.
      first: whether Σⱼ xᵢⱼ of the first group is returned too. Static.
      implementation: None chooses by the device that the code is traced for.

    Returns:
      u, then n as often as `uses` says, then the first group's sum if `first`; as the arrays.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    groups, factors = tuple(map(tuple, arrays)), tuple(weights)
    _check_arguments(groups, factors, gain, eps)
    x = groups[0][0]
    if choose(x.dtype, x.shape[-1], implementation) == "xla":
        return xla.sum_norm(groups, factors, gain, eps, scale, uses, first)
    kernels = dispatch.pallas_triton("stream", dispatch.current_device())
    results: tuple[Array, ...] = kernels.sum_norm(groups, factors, gain, eps, scale, uses, first)
    return results


def _check_arguments(
    groups: tuple[tuple[Array, ...], ...],
    weights: tuple[Array | None, ...],
    gain: Array | None,
    eps: float,
) -> None:
    if not groups or not groups[0] or len(weights) != len(groups):
        counts = f"{len(groups)} groups and {len(weights)} weights"
        raise ValueError(f"there are {counts}; expected as many, with an array in the first group")
    first = groups[0][0]
    if first.ndim < 2 or first.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"an array is {describe(first)}; expected bfloat16 or float32 [..., D]")
    for x in (x for group in groups for x in group):
        if x.shape != first.shape or x.dtype != first.dtype:
            raise ValueError(f"an array is {describe(x)}; expected {describe(first)}")
    width = first.shape[-1]
    for vector in (vector for vector in (*weights, gain) if vector is not None):
        if vector.shape != (width,) or vector.dtype != jnp.float32:
            raise ValueError(f"a weight is {describe(vector)}; expected float32 [{width}]")
    if not eps > 0:
        raise ValueError(f"eps is {eps!r}; expected a number above 0")


def choose(dtype: jnp.dtype, width: int, implementation: Implementation | None) -> str:
    """The implementation that `sum_norm` takes, here and now, and logs with its reason.

    Raises CannotServe, with the reason, if the named implementation cannot serve.
    """
    device = dispatch.current_device()
    return dispatch.kernel_or_xla(
        OPERATION,
        implementation,
        functools.partial(check, device, width),
        tuned_entry(device, dtype, width),
        f"{dtype}, width {width}",
    )


def check(device: Device, width: int) -> None:
    """Raises CannotServe if the kernels cannot serve rows of that width on that device."""
    dispatch.pallas_triton("stream", device)
    if width % 8 or width > MOST:
        raise CannotServe(f"pallas_triton serves widths of 8, 16, … {MOST}; the stream has {width}")
