"""Options of XLA's compiler for a step, and the memory that a CPU keeps between steps."""

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels.dispatch import Device

from sngpt_jax.config import ConfigError, TrainConfig
from sngpt_jax.training import compiler
from tests.tiny_run import ROOT, environment

H100 = Device("cuda", "NVIDIA H100 80GB HBM3")


def test_options_follow_the_device_and_the_recipe_comes_last():
    scheduler = "xla_gpu_enable_latency_hiding_scheduler"
    train = TrainConfig(xla_options=(f"{scheduler}=False", "xla_backend_optimization_level=2"))
    assert compiler.options(TrainConfig(), Device("tpu", "v5e")) == {}
    assert compiler.options(TrainConfig(), Device("cpu", "cpu")) == compiler.CPU
    wanted = {scheduler: False, "xla_backend_optimization_level": "2"}
    assert compiler.options(train, H100) == wanted


def test_deterministic_is_an_option_of_gpus():
    train = dataclasses.replace(TrainConfig(), deterministic=True)
    assert compiler.options(train, H100) == compiler.CUDA | {"xla_gpu_deterministic_ops": True}
    assert compiler.options(train, Device("cpu", "cpu")) == compiler.CPU


def lowered(options):
    return jax.jit(lambda x: jnp.sum(x), compiler_options=options).lower(jnp.ones(3))


def test_every_option_is_known_to_this_compiler():
    everything = compiler.CPU | compiler.CUDA | compiler.CUDA_DETERMINISTIC
    assert compiler.compile_step(lowered(everything))(jnp.ones(3)) == 3


@pytest.mark.parametrize(
    "options", [{"xla_nonsense": True}, {"xla_gpu_deterministic_ops": "perhaps"}]
)
def test_an_option_that_xla_does_not_know_is_one_line(options):
    with pytest.raises(ConfigError, match="train.xla_options or an option of the package: "):
        compiler.compile_step(lowered(options))


def test_options_of_the_call_are_added():
    with pytest.raises(ConfigError, match="xla_nonsense"):
        compiler.compile_step(lowered(compiler.CPU), {"xla_nonsense": True})


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
from sngpt_jax.training.compiler import keep_working_memory
if sys.argv[1] == "kept":
    keep_working_memory()
program = jax.jit(lambda x: jnp.sum(x @ x.T))  # of a product that takes 64 MB
x = jnp.ones((1 << 12, 16))
for _ in range(3):
    program(x).block_until_ready()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # a system short of memory takes some pages back now and then
"""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="glibc's heap",
)
@pytest.mark.skipif(
    HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text(), reason="huge pages: few faults"
)
def test_a_program_finds_the_memory_of_the_call_before():
    def page_faults(how):
        command = [sys.executable, "-c", MEMORY, how]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert page_faults("kept") < 1000
    if jax.__version_info__ < (0, 11):  # 0.12 finds it by itself
        assert page_faults("as jax does") > 10_000
