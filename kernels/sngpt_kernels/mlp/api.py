"""The public operation: it checks its arguments, chooses an implementation and calls it."""

import functools
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device, describe
from sngpt_kernels.mlp import xla

Implementation = Literal["xla", "pallas_triton"]
Activation = Literal["relu2", "leaky_relu2"]
OPERATION = "mlp.residual_mlp"
WIDTHS = 128  # tiles divide all widths


def tuned_entry(device: Device, dtype: jnp.dtype, width: int, hidden: int) -> dict[str, Any]:
    """The entry of these arguments in the device's table, or {}."""
    table = dispatch.tuned("sngpt_kernels.mlp", device.kind)
    return table.get(f"{dtype}_d{width}_f{hidden}", {})


def residual_mlp(
    x: Array,
    y: Array,
    out: Array,
    up: Array,
    down: Array,
    *,
    activation: Activation,
    eps: float,
    scale: float = 1.0,
    implementation: Implementation | None = None,
) -> Array:
    """u + activation(n up) down with u = x + y out, and n = scale · u / sqrt(mean(u²) + eps).

    `relu2` is relu(h)²; `leaky_relu2` is h² above zero and h²/4 below. The kernels compute in
    float32, and round u, the activation and the result once. The gradient has no derivative. The
    operation works under jit, vmap, jax.checkpoint and inside jax.shard_map(check_vma=False).

    Args:
      x: the residual stream [..., D], bfloat16 or float32.
      y: the attention's heads [..., E].
      out: [E, D]; up: [D, F]; down: [F, D]. All arguments have one dtype.
      activation: static, as `scale` is.
      eps: added to the mean square, above 0. Static.
      implementation: None chooses by the device that the code is traced for.

    Returns:
      [..., D], as x.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    _check_arguments(x, y, out, up, down, activation, eps)
    arguments = x, y, out, up, down, activation, eps, scale
    if choose(x.dtype, (*out.shape, up.shape[1]), activation, implementation) == "xla":
        return xla.residual_mlp(*arguments)
    kernels = dispatch.pallas_triton("mlp", dispatch.current_device())
    result: Array = kernels.residual_mlp(*arguments)
    return result


def _check_arguments(
    x: Array, y: Array, out: Array, up: Array, down: Array, activation: str, eps: float
) -> None:
    if x.ndim < 2 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {describe(x)}; expected bfloat16 or float32 [..., D]")
    D, E, F = x.shape[-1], y.shape[-1], up.shape[-1]
    shapes = {"y": (*x.shape[:-1], E), "out": (E, D), "up": (D, F), "down": (F, D)}
    for (name, shape), array in zip(shapes.items(), (y, out, up, down), strict=True):
        if array.shape != shape or array.dtype != x.dtype:
            raise ValueError(f"{name} is {describe(array)}; expected {x.dtype} {list(shape)}")
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}; expected relu2 or leaky_relu2")
    if not eps > 0:
        raise ValueError(f"eps is {eps!r}; expected a number above 0")


def choose(
    dtype: jnp.dtype,
    widths: tuple[int, ...],
    activation: str,
    implementation: Implementation | None,
) -> str:
    """The implementation for the `widths` E, D and F, here and now; logs it with its reason.

    Raises CannotServe, with the reason, if the named implementation cannot serve.
    """
    device, (_, width, hidden) = dispatch.current_device(), widths
    return dispatch.kernel_or_xla(
        OPERATION,
        implementation,
        functools.partial(check, device, dtype, widths, activation),
        tuned_entry(device, dtype, width, hidden),
        f"{dtype}, widths {width} and {hidden}",
        unmeasured="its products may be slower than cuBLAS's, and no measurement says otherwise",
    )


def check(device: Device, dtype: jnp.dtype, widths: tuple[int, ...], activation: str) -> None:
    """Raises CannotServe if the kernels cannot serve such arguments on that device."""
    dispatch.pallas_triton("mlp", device)
    if dtype != jnp.bfloat16:
        raise CannotServe(f"pallas_triton serves bfloat16; the stream is {dtype}")
    if activation not in get_args(Activation):
        raise CannotServe(f"pallas_triton serves relu2 and leaky_relu2, not {activation}")
    if any(width % WIDTHS for width in widths):
        found = ", ".join(map(str, widths))
        raise CannotServe(f"pallas_triton serves multiples of {WIDTHS}; the widths are {found}")
