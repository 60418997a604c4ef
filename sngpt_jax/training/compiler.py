"""The options of XLA's compiler for a training step, and the memory of a step on a CPU.

The options belong to the jitted step, so that they also reach a compilation for absent devices
(`plan --topology`). docs/performance.md lists the measurements.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import jax
from sngpt_kernels.dispatch import Device

from sngpt_jax.base.files import at_home
from sngpt_jax.config import ConfigError, TrainConfig

Options = dict[str, str | bool | int]

# jax 0.10 multiplies by YNNPACK, which is slower than Eigen, but faster for sums over rows.
CPU: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

# Collectives start as early and end as late as the data allow.
CUDA: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}

# no atomic additions, and no algorithm chosen by timing, which may differ in the next process
CUDA_DETERMINISTIC: Options = {"xla_gpu_deterministic_ops": True}


def options(train: TrainConfig, device: Device) -> Options:
    """The compiler options of a recipe's step on `device`; `train.xla_options` come last."""
    chosen = dict({"cpu": CPU, "cuda": CUDA}.get(device.platform, {}))
    if train.deterministic and device.platform == "cuda":
        chosen |= CUDA_DETERMINISTIC
    for name, value in (option.split("=", 1) for option in train.xla_options):
        chosen[name] = {"true": True, "false": False}.get(value.lower(), value)
    return chosen


def compile_step(lowered: jax.stages.Lowered, more: Mapping[str, Any] | None = None) -> Any:
    """Compiles the step with its own and `more` options.

    Raises `ConfigError` if XLA does not know an option or a value.
    """
    try:
        return lowered.compile(compiler_options=dict(more or {}))
    except jax.errors.JaxRuntimeError as error:
        if "compile option" in str(error) or "While setting option" in str(error):
            raise ConfigError(f"train.xla_options or an option of the package: {error}") from None
        raise


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless it is empty, for later processes."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", at_home(folder))


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_working_memory() -> None:
    """Makes glibc reuse freed memory between CPU steps. Call it before jax touches a device.

    XLA allocates a program's temporary arrays at every call. glibc requests large ones from the
    system, which clears them page by page. So all arrays come from the heap, which keeps its
    memory. Programs run in the calling thread, because only the main thread's heap grows beyond
    64 MB. GPUs and programs for several devices are not affected.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other systems may lack it
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
