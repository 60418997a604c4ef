"""What XLA's compiler is told about a training step. The one place for it: no environment variable
is needed.

The options go with the jitted step, so that they reach a compilation for devices that are not here
too (`plan --topology`). What a recipe adds in `train.xla_options` comes last. docs/performance.md
has what was tried.
"""

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import jax
from sngpt_kernels.dispatch import Device

from sngpt_jax.config import ConfigError, TrainConfig

Options = dict[str, str | bool | int]

# On a CPU jax 0.10 gives products to YNNPACK, which takes 1.2 to 1.9 times as long as Eigen for
# those of a small GPT; sums over rows it does better. jax 0.12 has neither on.
CPU: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

# Collectives start as early and end as late as the data allow, whatever XLA's default. Command
# buffers (CUDA graphs) are left at it.
CUDA: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}

# No atomic additions, and no algorithm chosen by timing, which may be another in the next process.
CUDA_DETERMINISTIC: Options = {"xla_gpu_deterministic_ops": True}


def options(train: TrainConfig, device: Device) -> Options:
    """The compiler options of a recipe's training step on that device."""
    chosen = dict({"cpu": CPU, "cuda": CUDA}.get(device.platform, {}))
    if train.deterministic and device.platform == "cuda":
        chosen |= CUDA_DETERMINISTIC
    for name, value in (option.split("=", 1) for option in train.xla_options):
        chosen[name] = {"true": True, "false": False}.get(value.lower(), value)
    return chosen


def compile_step(
    lowered: jax.stages.Lowered, more: Mapping[str, str | bool | int] | None = None
) -> Any:
    """The compiled step, with `more` options beside its own. Raises `ConfigError` where XLA knows
    no such option or value.
    """
    added: dict[str, Any] = dict(more or {})
    try:
        return lowered.compile(compiler_options=added)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" in str(error) or "While setting option" in str(error):
            raise ConfigError(
                f"an option of XLA's compiler, train.xla_options or one of the package's: {error}"
            ) from None
        raise


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` (~ is the home directory) for later processes; empty:
    keeps none.
    """
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_working_memory() -> None:
    """Has a step on the CPU find the memory of the step before; to be called before jax has
    touched a device.

    XLA allocates a program's temporary arrays at every call, 134 MB for a step of `quickstart`.
    glibc asks the system for more than 32 MB anew each time, and the system clears it, page by
    page: 37,000 page faults a step, a third of its time. So large arrays too come from the heap,
    nothing of which is given back, and programs run in the thread that calls them: only the main
    thread's heap grows beyond 64 MB. GPUs are not affected, nor are programs for several devices.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if jax.default_backend() == "cpu" else None
    )
    if mallopt is not None:  # glibc, which other systems need not have
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
