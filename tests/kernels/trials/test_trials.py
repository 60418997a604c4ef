"""The trials of the two successors of Pallas Triton, as far as they run without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels.rotary import reference

EPS = 1e-6


def draw(B, T, H, K, h, r):
    """bfloat16 heads, and float32 gain, cosines and sines."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 9, size=(1, T, r // 2))
    arrays = rng.normal(size=H), np.cos(angles), np.sin(angles)
    x = jnp.asarray(rng.normal(size=(B, T, H + K, h)), jnp.bfloat16)
    return x, *(array.astype(np.float32) for array in arrays)


class TestMosaic:
    """In jax's interpreter for Mosaic GPU, whose detector of races raises an error."""

    @pytest.fixture
    def trial(self):
        if jax.__version_info__ < (0, 12):
            pytest.skip("the trial is written for jax 0.12")
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
        from jax.experimental.pallas import mosaic_gpu

        from tests.kernels.trials import mosaic_rotary

        races = mosaic_gpu.InterpretGPUParams(detect_races=True, on_race="raise")
        yield lambda *arrays: mosaic_rotary.prepare(*arrays, eps=EPS, interpret=races)
        interpret_pallas_call.reset_gpu_interpret_mode_state()  # an error leaves its state

    @pytest.mark.parametrize("rotated", [16, 64])
    def test_equals_the_definition_without_a_race(self, trial, rotated):
        x, *others = draw(2, 128, 2, 1, 64, rotated)
        want = reference.prepare(np.asarray(x, np.float64), *others, eps=EPS)
        got = np.asarray(trial(x, *others), np.float64)
        assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()

    @pytest.mark.parametrize("call", ["barrier_wait", "commit_smem", "wait_smem_to_gmem"])
    def test_a_missing_wait_is_a_race(self, trial, call, monkeypatch):
        monkeypatch.setattr(f"jax.experimental.pallas.mosaic_gpu.{call}", lambda *_: None)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
            jax.block_until_ready(trial(*draw(1, 64, 2, 1, 64, 64)))


def test_jax_triton_lowers_for_an_absent_gpu():
    """It needs jax 0.11 with its CUDA plugin, and the packages triton and jax-triton."""
    pytest.importorskip("jax_triton", exc_type=ImportError)
    if jax.__version_info__ >= (0, 12):
        pytest.skip("jax_triton 0.4.1 does not work with jax 0.12")
    from tests.kernels.trials import triton_rotary

    function = jax.jit(lambda *arrays: triton_rotary.prepare(*arrays, eps=EPS, capability=90))
    traced = function.trace(*draw(2, 128, 2, 1, 64, 16))
    assert "triton_kernel_call" in traced.lower(lowering_platforms=("cuda",)).as_text()
