"""Attention by two libraries, which the extra `attention` installs.

tokamax (https://github.com/openxla/tokamax) has kernels in Mosaic GPU. fa4-jax
(https://pypi.org/project/fa4-jax) wraps the FlashAttention-4 kernels. A library is imported where
it is chosen.
"""

import importlib.util
import logging
import sys

import jax
from jax import Array

from sngpt_kernels.dispatch import CannotServe, Device

# The first numbers of the compute capabilities that have a forward and a backward kernel.
MAJORS = {"tokamax": (9, 10), "fa4_jax": (8, 9, 10, 12)}


def check(library: str, device: Device) -> None:
    """Raises CannotServe, with the reason, if the library cannot serve an NVIDIA GPU."""
    if device.capability[0] not in MAJORS[library]:
        served = " and ".join(f"{major}.x" for major in MAJORS[library])
        has = "{} has {}.{}".format(device.kind, *device.capability)
        raise CannotServe(f"{library} serves compute capabilities {served}; {has}")
    if importlib.util.find_spec(library) is None:
        python = "Python {}.{} is too old for it".format(*sys.version_info)
        install = "run: pip install 'sngpt-jax[attention]'"
        why = python if sys.version_info < (3, 12) else install
        raise CannotServe(f"{library} is not installed; {why}")
    # The library asks jax's first device for its kind, and no other device.
    if library == "fa4_jax" and jax.devices()[0].platform != "gpu":
        raise CannotServe(f"{library} compiles on a machine with a GPU only")


def _is_news(record: logging.LogRecord) -> bool:
    """False for tokamax's remark, twice per layer, that it takes its usual block sizes."""
    return not record.getMessage().startswith("Autotuning cache miss")


def attention(
    library: str, q: Array, k: Array, v: Array, scale: float, *, plain: bool = False
) -> Array:
    """`api.attention` without the exclusion, of valid arguments.

    `plain` takes the library's own version in plain jax, for any device and dtype.
    """
    if library == "tokamax":
        import tokamax

        logging.getLogger("absl").addFilter(_is_news)
        implementation = "xla" if plain else "mosaic"
        return tokamax.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation=implementation
        )
    import fa4_jax

    backend = "reference" if plain else "cute"
    return fa4_jax.flash_attn(q, k, v, scale=scale, causal=True, backend=backend)
