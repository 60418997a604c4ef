"""The kernel that encodes, as it is traced and lowered for a GPU."""

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.cayley import pallas_triton
from sngpt_kernels.cayley.dictionary import Scheme

from tests.kernels.cayley_checks import D1024, D2048
from tests.kernels.lowering import H100


def traced(levels):
    scheme = Scheme(levels)
    shapes = [
        jax.ShapeDtypeStruct((8, scheme.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((scheme.width,), jnp.float32),
        *(jax.ShapeDtypeStruct((scheme.features,), jnp.float32),) * 2,
    ]
    return jax.jit(lambda *a: pallas_triton.encode_decode(*a, scheme)).trace(*shapes)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [D1024, D2048])
def test_lowers_for_a_gpu(levels):
    """Pallas Triton can express the kernel. This needs no GPU and no compiler of one."""
    with dispatch.targeting(H100):
        lowered = traced(levels).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("cayley_forward") >= 1


@pytest.mark.parametrize("levels", [D1024[:1], D1024[:2], D1024])
def test_stored_values_are_read_after_a_barrier(levels):
    """Interpret mode cannot show a missing barrier. Before a level's selection there is one, and
    two more in a later level. Two are at the end of a token, and one is before its decoding.
    """
    assert str(traced(levels).jaxpr).count("debug_barrier") == 3 * len(levels) + 1
