"""The public operation: checks its arguments and calls the implementation."""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from kernels.cayley import xla
from kernels.cayley.dictionary import Generators, Levels, check_levels

log = logging.getLogger("kernels")


@functools.cache
def _announce(implementation: str, reason: str) -> None:
    """One line of the log for each implementation that a process uses."""
    log.info("cayley.encode_decode runs as %s: %s", implementation, reason)


def _is_level(level: object) -> bool:
    return isinstance(level, tuple) and len(level) == 3 and all(type(number) is int for number in level)


def encode_decode(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: Levels,
    *,
    forward_standardized: bool = True,
    generators: Generators = "spread",
    implementation: Literal["xla"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sparse parity code of x and its reconstruction.

    With the atoms v_f of `dictionary.atoms`, z_f = ⟨x - mean, v_f⟩ / max(std_f, 1e-3) and y_f = z_f + bias_f, the k_0 features
    of level 0 with the largest y are selected, then at every further level the k with the largest y among the set of
    children of the features just selected, equal ones by the lower id. The reconstruction is Σ c_f v_f over all selected
    features with c_f = max(y_f, 0), or max(⟨x - mean, v_f⟩ + bias_f, 0) where not `forward_standardized`. Sums are float32.

    Gradients go to x and bias through the selected features with c_f > 0, as if the selection were constant; mean and std
    have none. Kept for the backward pass are the ids, four bytes for each selected feature, and std. It works under jit,
    vmap, jax.checkpoint and inside jax.shard_map(check_vma=False). An x, mean or bias that is not finite gives output
    that is not, and valid ids.

    Args:
      x: [..., d], bfloat16 or float32; d is a power of two from 4 to 2^18.
      mean: [d] float32, the mean of x.
      std: [F] float32, F = 2^n of the last level: the standard deviation of the score ⟨x, v_f⟩ of each feature.
      bias: [F] float32.
      levels: (n, k, degree) for each level, see `dictionary.check_levels`. Static.
      forward_standardized: whether standardized scores enter the reconstruction.
      generators: "spread", or "prefix" for a plain prefix tree. Static.
      implementation: "xla", or None to choose.

    Returns:
      x_hat [..., d] in x's dtype, and ids [..., Σk] int32 of the selected features, level by level, in no order within a level.

    Raises:
      ValueError: an argument is not as described.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f'implementation is {implementation!r}; expected "xla" or None')
    if x.ndim < 1 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; expected bfloat16 or float32 with at least one axis")
    if not isinstance(levels, tuple) or not all(_is_level(level) for level in levels):
        raise ValueError(f"levels is {levels!r}; expected a tuple of tuples of three integers (n, k, degree)")
    check_levels(levels, x.shape[-1], generators)
    features = 2 ** levels[-1][0]
    for name, array, size in (("mean", mean, x.shape[-1]), ("std", std, features), ("bias", bias, features)):
        if array.shape != (size,) or array.dtype != jnp.float32:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected float32 [{size}]")
    _announce("xla", "as asked" if implementation else "the only implementation")
    return xla.encode_decode(x, mean, std, bias, levels, forward_standardized, generators)
