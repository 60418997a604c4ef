"""Every test runs on eight CPU devices, with silent broadcasting between ranks an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)  # not XLA_FLAGS, which the processes that tests start would inherit
jax.config.update("jax_numpy_rank_promotion", "raise")
