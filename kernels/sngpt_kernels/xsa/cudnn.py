"""The operation by cuDNN's fused attention. XLA adds the exclusion as one elementwise kernel.

Nothing of size T² is stored. It serves NVIDIA GPUs of compute capability 8.0 and later.
"""

import jax
import jax.numpy as jnp

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.xsa.xla import exclude_own_value


def check(device: Device, dtype: jnp.dtype, head_size: int) -> None:
    """Raises CannotServe, with the reason, if cuDNN has no attention for these."""
    dispatch.check_nvidia("cudnn", device)
    if dtype != jnp.bfloat16:
        raise CannotServe(f"cudnn serves bfloat16; q is {dtype}")
    if head_size % 8 or head_size > 128:
        raise CannotServe(f"cudnn serves head sizes of 8, 16, … 128; q has {head_size}")


def attention(q: jax.Array, k: jax.Array, v: jax.Array, exclusive: bool, scale: float) -> jax.Array:
    """`api.attention` of valid arguments."""
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return exclude_own_value(y, v) if exclusive else y
