"""The operation as Pallas Triton kernels for NVIDIA GPUs.

The forward pass is one kernel, the backward pass is two kernels and a sort. A program of the
forward kernel encodes its tokens one after the other with all its warps (`pallas_encode`) and then
decodes them side by side (`pallas_decode`). Scores stay on chip. Ids and coefficients pass through
memory once, because a thread needs values that another thread chose. The backward pass needs four
bytes per selected feature, and the argument std.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels import dispatch
from sngpt_kernels.cayley import pallas_backward, pallas_decode, pallas_encode
from sngpt_kernels.cayley.api import table_key
from sngpt_kernels.cayley.dictionary import Levels, Scheme
from sngpt_kernels.cayley.folding import fold
from sngpt_kernels.cayley.pallas_backward import ID_MASK
from sngpt_kernels.cayley.reference import STD_FLOOR


@dataclass(frozen=True)
class Config:
    """Block sizes.

    The threads of a program share its columns: its tokens times d / 32, the words of a token.
    """

    forward_tokens: int
    forward_warps: int
    backward_tokens: int
    backward_warps: int
    bias_features: int  # per program of the kernel that adds up the bias gradient
    bias_lanes: int  # per feature of that kernel
    bias_warps: int

    @classmethod
    def heuristic(cls, d: int) -> "Config":
        """One column per thread, with at most 16 tokens so that narrow tokens leave programs."""
        tokens = min(max(1, pallas_encode.THREADS * pallas_decode.WORD // d), 16)
        return cls(tokens, 4, tokens, 4, bias_features=8, bias_lanes=128, bias_warps=4)

    @classmethod
    def of(cls, dtype: jnp.dtype, levels: Levels) -> "Config":
        """The entry of the device's table, or `heuristic` if it has none."""
        table = dispatch.tuned("sngpt_kernels.cayley", dispatch.current_device().kind)
        entry = table.get(table_key(dtype, levels), {})
        return cls(**entry["config"]) if "config" in entry else cls.heuristic(2 ** levels[0][0])


@dataclass(frozen=True)
class _Static:
    """What a call does not compute with."""

    scheme: Scheme
    config: Config
    interpret: bool


check = pallas_encode.check


def encode_decode(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    scheme: Scheme,
    *,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`api.encode_decode` of valid arguments, with d from 64 to 2048.

    `config` None is the device's. `interpret` runs the kernels in plain jax, on any device.
    """
    config = config or Config.of(x.dtype, scheme.levels)
    return _encode_decode(x, mean, std, bias, _Static(scheme, config, interpret))


def _forward_kernel(
    x_ref: Any,
    constant_refs: tuple[Any, ...],
    table_refs: tuple[Any, ...],
    words_ref: Any,
    x_hat_ref: Any,
    saved_ref: Any,
    c_ref: Any,
    *,
    static: _Static,
) -> None:
    (rows, d), tokens = x_ref.shape, static.config.forward_tokens
    first_row = pl.program_id(0) * tokens
    refs = x_ref, constant_refs, table_refs, saved_ref, c_ref

    def encode(token: jax.Array, _: None) -> None:
        pallas_encode.encode_token(first_row + token, *refs, static.scheme, static.interpret)

    lax.fori_loop(0, jnp.minimum(tokens, rows - first_row), encode, None)
    # Threads read ids and coefficients that other threads stored.
    pallas_encode.barrier(static.interpret)
    at = pallas_decode.tile(first_row, rows, tokens, d)
    sums = pallas_decode.decode(at, saved_ref, c_ref, words_ref, ID_MASK)
    pallas_decode.store(x_hat_ref, at, sums * np.float32(d**-0.5))


def _forward(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """x_hat like x, and the saved ids [..., A]."""
    scheme, tokens = static.scheme, static.config.forward_tokens
    d, active, rows = scheme.width, scheme.active, x.size // scheme.width
    if rows == 0:
        return x, jnp.zeros((*x.shape[:-1], active), jnp.int32)
    constants = pallas_encode.constants(scheme)
    tables = pallas_encode.tables(mean, std, bias, scheme)
    words = pallas_decode.table(d, bias.shape[0])
    inputs: tuple[Any, ...] = (*constants, *tables, words)
    scored = sum(
        fold(scheme.levels, scheme.generators, level).member_steps.size
        * scheme.levels[level - 1][1]
        for level in range(1, len(scheme.levels))
    )
    x_hat, saved, _ = pl.pallas_call(
        partial(_forward_kernel, static=static),
        out_shape=(
            jax.ShapeDtypeStruct((rows, d), x.dtype),
            jax.ShapeDtypeStruct((rows, active), jnp.int32),
            jax.ShapeDtypeStruct((rows, active), jnp.float32),  # c: scratch
        ),
        grid=(pl.cdiv(rows, tokens),),
        compiler_params=plgpu.CompilerParams(num_warps=static.config.forward_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * (active + scored) * d,
            transcendentals=0,
            bytes_accessed=2 * x.nbytes + 8 * rows * active + sum(array.nbytes for array in inputs),
        ),
        name="cayley_forward",
        interpret=static.interpret,
    )(x.reshape(rows, d), constants, tables, words)
    return x_hat.reshape(x.shape), saved.reshape(*x.shape[:-1], active)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _encode_decode(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array]:
    x_hat, saved = _forward(x, mean, std, bias, static)
    return x_hat, saved & ID_MASK


def _encode_decode_fwd(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, static: _Static
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    forward = dispatch.without_derivative("cayley.encode_decode", partial(_forward, static=static))
    x_hat, saved = forward(x, mean, std, bias)
    return (x_hat, saved & ID_MASK), (saved, std if static.scheme.forward_standardized else None)


def _encode_decode_bwd(
    static: _Static,
    residuals: tuple[jax.Array, jax.Array | None],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None, jax.Array]:
    (saved, std), config, features = residuals, static.config, static.scheme.features
    dx_hat, _ = cotangents  # ids carry none
    if dx_hat.size == 0:
        return dx_hat, None, None, jnp.zeros(features, jnp.float32)
    saved = saved.reshape(-1, saved.shape[-1])
    inverse_std = (
        jnp.ones(features, jnp.float32) if std is None else 1 / jnp.maximum(std, STD_FLOOR)
    )
    backward = partial(
        pallas_backward.backward,
        tokens=config.backward_tokens,
        num_warps=config.backward_warps,
        interpret=static.interpret,
    )
    dx, g = dispatch.without_derivative("cayley.encode_decode", backward)(
        dx_hat.reshape(-1, dx_hat.shape[-1]), saved, inverse_std
    )
    dbias = pallas_backward.bias_gradient(
        saved,
        g,
        features,
        block=config.bias_features,
        lanes=config.bias_lanes,
        num_warps=config.bias_warps,
        interpret=static.interpret,
    )
    return dx.reshape(dx_hat.shape), None, None, dbias


_encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)
