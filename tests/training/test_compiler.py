"""Options of XLA's compiler: which go with a step on which device, and that they reach the
compiler.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels.dispatch import Device

from sngpt_jax.config import ConfigError, TrainConfig
from sngpt_jax.training import compiler

H100 = Device("cuda", "NVIDIA H100 80GB HBM3")


def test_options_follow_the_device_and_the_recipe_comes_last():
    train = TrainConfig(
        xla_options=(
            "xla_gpu_enable_latency_hiding_scheduler=False",
            "xla_backend_optimization_level=2",
        )
    )
    assert compiler.options(TrainConfig(), Device("tpu", "v5e")) == {}
    assert compiler.options(TrainConfig(), Device("cpu", "cpu")) == compiler.CPU
    assert compiler.options(train, H100) == {
        "xla_gpu_enable_latency_hiding_scheduler": False,
        "xla_backend_optimization_level": "2",
    }


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
    with pytest.raises(ConfigError, match="train.xla_options or one of the package's: "):
        compiler.compile_step(lowered(options))


def test_options_of_the_call_are_added():
    with pytest.raises(ConfigError, match="xla_nonsense"):
        compiler.compile_step(lowered(compiler.CPU), {"xla_nonsense": True})
