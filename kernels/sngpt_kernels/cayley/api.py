"""The public operation: it checks its arguments and calls an implementation."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array

from sngpt_kernels import dispatch
from sngpt_kernels.cayley import xla
from sngpt_kernels.cayley.dictionary import Generators, Levels, Scheme, check_levels
from sngpt_kernels.dispatch import CannotServe, Device, describe

Implementation = Literal["xla", "pallas_triton"]


def _is_level(level: object) -> bool:
    return isinstance(level, tuple) and [type(number) for number in level] == [int] * 3


def encode_decode(
    x: Array,
    mean: Array,
    std: Array,
    bias: Array,
    levels: Levels,
    *,
    forward_standardized: bool = True,
    generators: Generators = "spread",
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """The sparse parity code of x and its reconstruction.

    Let v_f be `dictionary.atoms` and y_f = ⟨x - mean, v_f⟩ / max(std_f, 1e-3) + bias_f. Level 0
    selects the features with the k largest y, every further level among the set of children of the
    features just selected. Of equal ones the lower id wins. The reconstruction is Σ c_f v_f over
    all selected features. c_f is max(y_f, 0) if `forward_standardized`, else
    max(⟨x - mean, v_f⟩ + bias_f, 0). Sums are float32.

    x and bias get gradients through the selected features with c_f > 0, as if the selection were
    constant. mean and std get none. The operation works under jit, vmap, jax.checkpoint and inside
    jax.shard_map(check_vma=False). If x, mean or bias is not finite, the output is not finite
    either, and the ids are valid. The gradients of `pallas_triton` have no derivative.

    Args:
      x: [..., d], bfloat16 or float32; d is a power of two from 4 to 2^18.
      mean: [d] float32, the mean of x.
      std: [F] float32, F = 2^n of the last level: the standard deviation of each score ⟨x, v_f⟩.
      bias: [F] float32.
      levels: (n, k, degree) per level. Static, like the following arguments.
      forward_standardized: whether standardized scores enter the reconstruction.
      generators: "spread", or "prefix" for a plain prefix tree.
      implementation: None chooses by the device that the code is traced for: "pallas_triton" on
        NVIDIA GPUs where it can serve, else "xla".

    Returns:
      x_hat [..., d] in x's dtype, and the selected ids [..., Σk] int32, level by level.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the named implementation does not serve these arguments on this device.
    """
    dispatch.check_name(implementation, get_args(Implementation))
    if x.ndim < 1 or x.dtype not in (jnp.bfloat16, jnp.float32):
        expected = "bfloat16 or float32 with at least one axis"
        raise ValueError(f"x is {describe(x)}; expected {expected}")
    if not isinstance(levels, tuple) or not all(map(_is_level, levels)):
        expected = "a tuple of tuples of three integers (n, k, degree)"
        raise ValueError(f"levels is {levels!r}; expected {expected}")
    check_levels(levels, x.shape[-1], generators)
    scheme = Scheme(levels, forward_standardized, generators)
    for name, array in (("mean", mean), ("std", std), ("bias", bias)):
        size = scheme.width if name == "mean" else scheme.features
        if array.shape != (size,) or array.dtype != jnp.float32:
            raise ValueError(f"{name} is {describe(array)}; expected float32 [{size}]")
    device = dispatch.current_device()
    chosen, reason = implementation or "", "as asked"
    if not chosen:
        chosen, reason = choose(device, x.dtype, levels, generators)
    elif chosen == "pallas_triton":
        check_pallas_triton(device, levels, generators)
    dispatch.announce("cayley.encode_decode", chosen, reason)
    module = xla if chosen == "xla" else dispatch.pallas_triton("cayley", device)
    return module.encode_decode(x, mean, std, bias, scheme)


def tuned_entry(device: Device, dtype: jnp.dtype, levels: Levels) -> dict[str, Any]:
    """The entry of these arguments in the device's table, or {}."""
    key = f"{dtype}_d{2 ** levels[0][0]}_{len(levels)}l"
    return dispatch.tuned("sngpt_kernels.cayley", device.kind).get(key, {})


def check_pallas_triton(device: Device, levels: Levels, generators: Generators) -> None:
    """Raises CannotServe, with the reason, if the Pallas Triton kernels cannot serve."""
    dispatch.pallas_triton("cayley", device).check(levels, generators)


def choose(
    device: Device, dtype: jnp.dtype, levels: Levels, generators: Generators
) -> tuple[Implementation, str]:
    """The implementation for x of that dtype on that device, and the reason."""
    try:
        check_pallas_triton(device, levels, generators)
    except CannotServe as error:
        return "xla", str(error)
    if fastest := tuned_entry(device, dtype, levels).get("implementation"):
        return fastest, f"the fastest measured on {device.kind}, {dtype}, {len(levels)} levels"
    return "pallas_triton", "on an NVIDIA GPU, where no measurement says another"
