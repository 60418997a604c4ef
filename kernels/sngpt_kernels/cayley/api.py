"""The public operation: checks its arguments and calls the implementation."""

import importlib
import importlib.util
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sngpt_kernels import dispatch
from sngpt_kernels.cayley import xla
from sngpt_kernels.cayley.dictionary import Generators, Levels, check_levels
from sngpt_kernels.dispatch import CannotServe, Device

Implementation = Literal["xla", "pallas_triton"]

# imported by name: a program bundled without it runs xla
PALLAS_TRITON = "sngpt_kernels.cayley.pallas_triton"


def _is_level(level: object) -> bool:
    return (
        isinstance(level, tuple)
        and len(level) == 3
        and all(type(number) is int for number in level)
    )


def encode_decode(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: Levels,
    *,
    forward_standardized: bool = True,
    generators: Generators = "spread",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sparse parity code of x and its reconstruction.

    With the atoms v_f of `dictionary.atoms`, z_f = ⟨x - mean, v_f⟩ / max(std_f, 1e-3) and y_f =
    z_f + bias_f, the k_0 features of level 0 with the largest y are selected, then at every
    further level the k with the largest y among the set of children of the features just selected,
    equal ones by the lower id. The reconstruction is Σ c_f v_f over all selected features with c_f
    = max(y_f, 0), or max(⟨x - mean, v_f⟩ + bias_f, 0) where not `forward_standardized`. Sums are
    float32.

    Gradients go to x and bias through the selected features with c_f > 0, as if the selection were
    constant; mean and std have none. Kept for the backward pass are the ids, four bytes for each
    selected feature, and std. It works under jit, vmap, jax.checkpoint and inside
    jax.shard_map(check_vma=False). An x, mean or bias that is not finite gives output that is not,
    and valid ids. The gradients of `pallas_triton` have no derivative themselves.

    Args:
      x: [..., d], bfloat16 or float32; d is a power of two from 4 to 2^18.
      mean: [d] float32, the mean of x.
      std: [F] float32, F = 2^n of the last level: the standard deviation of the score ⟨x, v_f⟩ of each feature.
      bias: [F] float32.
      levels: (n, k, degree) for each level, see `dictionary.check_levels`. Static.
      forward_standardized: whether standardized scores enter the reconstruction.
      generators: "spread", or "prefix" for a plain prefix tree. Static.
      implementation: None chooses by the device that the code is traced for, and says so once in the log: "pallas_triton" on
        NVIDIA GPUs where it serves, "xla" elsewhere.

    Returns:
      x_hat [..., d] in x's dtype, and ids [..., Σk] int32 of the selected features, level by level, in no order within a level.

    Raises:
      ValueError: an argument is not as described.
      CannotServe: the implementation asked for does not serve these arguments on this device.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        expected = " or ".join(get_args(Implementation))
        raise ValueError(f"implementation is {implementation!r}; expected {expected}, or None")
    if x.ndim < 1 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}; expected bfloat16 or float32 with at least one axis"
        )
    if not isinstance(levels, tuple) or not all(_is_level(level) for level in levels):
        raise ValueError(
            f"levels is {levels!r}; expected a tuple of tuples of three integers (n, k, degree)"
        )
    check_levels(levels, x.shape[-1], generators)
    features = 2 ** levels[-1][0]
    for name, array, size in (
        ("mean", mean, x.shape[-1]),
        ("std", std, features),
        ("bias", bias, features),
    ):
        if array.shape != (size,) or array.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}; expected float32 [{size}]"
            )
    device = dispatch.current_device()
    if implementation == "pallas_triton":
        check_pallas_triton(device, levels, generators)
    chosen, reason = (
        (implementation, "as asked")
        if implementation
        else choose(device, x.dtype, levels, generators)
    )
    dispatch.announce("cayley.encode_decode", chosen, reason)
    module = importlib.import_module(PALLAS_TRITON) if chosen == "pallas_triton" else xla
    return module.encode_decode(x, mean, std, bias, levels, forward_standardized, generators)


def table_key(dtype: jnp.dtype, levels: Levels) -> str:
    """The entry of `tuned/<device>.json` for such arguments: {"implementation": its fastest,
    "config": block sizes}.
    """
    return f"{dtype}_d{2 ** levels[0][0]}_{len(levels)}l"


def check_pallas_triton(device: Device, levels: Levels, generators: Generators) -> None:
    """Raises CannotServe, with the reason, where the Pallas Triton kernels are not made for these."""
    dispatch.check_nvidia("pallas_triton", device)
    if importlib.util.find_spec(PALLAS_TRITON) is None:
        raise CannotServe("pallas_triton is no part of this program")
    importlib.import_module(PALLAS_TRITON).check(levels, generators)


def choose(
    device: Device, dtype: jnp.dtype, levels: Levels, generators: Generators
) -> tuple[Implementation, str]:
    """The implementation for x of that dtype on that device, and why."""
    try:
        check_pallas_triton(device, levels, generators)
    except CannotServe as error:
        return "xla", str(error)
    measured = dispatch.tuned("sngpt_kernels.cayley", device.kind).get(table_key(dtype, levels), {})
    if "implementation" in measured:
        return (
            measured["implementation"],
            f"the fastest measured on {device.kind}, {dtype}, {len(levels)} levels",
        )
    return "pallas_triton", "on an NVIDIA GPU, where no measurement says another"
