"""The operation as Pallas Triton kernels, for NVIDIA GPUs: one for the forward pass, two and a
sort for the backward pass.

A program of the forward kernel codes its tokens one after the other with all its warps
(`pallas_encode`), then decodes them side by side (`pallas_decode`). Scores stay on chip; ids and
coefficients pass through memory once, as a thread needs those that another one chose. Between the
passes four bytes for each selected feature are kept, and std, which is an argument.
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
from sngpt_kernels.cayley.dictionary import Generators, Levels
from sngpt_kernels.cayley.folding import fold
from sngpt_kernels.cayley.pallas_backward import ID_MASK
from sngpt_kernels.cayley.reference import STD_FLOOR


@dataclass(frozen=True)
class Config:
    """Block sizes. A program's tokens times the words of a token, d / 32, are the columns that its
    threads share.
    """

    forward_tokens: int
    forward_warps: int
    backward_tokens: int
    backward_warps: int
    bias_features: int  # of a program that adds up the bias gradient
    bias_lanes: int  # of each of those features
    bias_warps: int

    @classmethod
    def heuristic(cls, d: int) -> "Config":
        """One column a thread, unless tokens are so narrow that too few programs would be left to
        code them.
        """
        tokens = min(max(1, pallas_encode.THREADS * pallas_decode.WORD // d), 16)
        return cls(tokens, 4, tokens, 4, bias_features=8, bias_lanes=128, bias_warps=4)

    @classmethod
    def of(cls, dtype: jnp.dtype, levels: Levels) -> "Config":
        """That of the device's table, where it has one, else `heuristic`."""
        entry = dispatch.tuned("sngpt_kernels.cayley", dispatch.current_device().kind).get(
            table_key(dtype, levels), {}
        )
        return cls(**entry["config"]) if "config" in entry else cls.heuristic(2 ** levels[0][0])


check = pallas_encode.check


def encode_decode(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: Levels,
    forward_standardized: bool,
    generators: Generators,
    *,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sngpt_kernels.cayley.encode_decode` of valid arguments and d from 64 to 2048; `config` None
    is the device's.
    """
    config = config or Config.of(x.dtype, levels)
    return _encode_decode(
        x, mean, std, bias, levels, forward_standardized, generators, interpret, config
    )


def _forward_kernel(
    x_ref: Any,
    constant_refs: tuple[Any, ...],
    table_refs: tuple[Any, ...],
    words_ref: Any,
    x_hat_ref: Any,
    saved_ref: Any,
    c_ref: Any,
    *,
    tokens: int,
    levels: Levels,
    forward_standardized: bool,
    generators: Generators,
    interpret: bool,
) -> None:
    rows, d = x_ref.shape
    first_row = pl.program_id(0) * tokens

    def encode(token: jax.Array, _: None) -> None:
        pallas_encode.encode_token(
            first_row + token,
            x_ref,
            constant_refs,
            table_refs,
            saved_ref,
            c_ref,
            levels=levels,
            generators=generators,
            forward_standardized=forward_standardized,
            interpret=interpret,
        )

    lax.fori_loop(0, jnp.minimum(tokens, rows - first_row), encode, None)
    # ids and coefficients are read by other threads than those that stored them
    pallas_encode.barrier(interpret)
    at = pallas_decode.tile(first_row, rows, tokens, d)
    sums = pallas_decode.decode(at, saved_ref, c_ref, words_ref, ID_MASK)
    pallas_decode.store(x_hat_ref, at, sums * np.float32(d**-0.5))


def _forward(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: Levels,
    forward_standardized: bool,
    generators: Generators,
    interpret: bool,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """x_hat like x, and the saved ids [..., A]."""
    d, active = x.shape[-1], sum(k for _, k, _ in levels)
    rows = x.size // d
    if rows == 0:
        return x, jnp.zeros((*x.shape[:-1], active), jnp.int32)
    constants = pallas_encode.constants(levels, generators, d)
    tables = pallas_encode.tables(mean, std, bias, levels, generators, forward_standardized)
    words = pallas_decode.table(d, bias.shape[0])
    inputs: tuple[Any, ...] = (*constants, *tables, words)
    multiply_adds = active * d + sum(
        fold(levels, generators, level).member_steps.size * levels[level - 1][1] * d
        for level in range(1, len(levels))
    )
    x_hat, saved, _ = pl.pallas_call(
        partial(
            _forward_kernel,
            tokens=config.forward_tokens,
            levels=levels,
            forward_standardized=forward_standardized,
            generators=generators,
            interpret=interpret,
        ),
        out_shape=(
            jax.ShapeDtypeStruct((rows, d), x.dtype),
            jax.ShapeDtypeStruct((rows, active), jnp.int32),
            jax.ShapeDtypeStruct((rows, active), jnp.float32),  # c: scratch
        ),
        grid=(pl.cdiv(rows, config.forward_tokens),),
        compiler_params=plgpu.CompilerParams(num_warps=config.forward_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * multiply_adds,
            transcendentals=0,
            bytes_accessed=2 * x.nbytes + 8 * rows * active + sum(array.nbytes for array in inputs),
        ),
        name="cayley_forward",
        interpret=interpret,
    )(x.reshape(rows, d), constants, tables, words)
    return x_hat.reshape(x.shape), saved.reshape(*x.shape[:-1], active)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _encode_decode(
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    levels: Levels,
    forward_standardized: bool,
    generators: Generators,
    interpret: bool,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    x_hat, saved = _forward(
        x, mean, std, bias, levels, forward_standardized, generators, interpret, config
    )
    return x_hat, saved & ID_MASK


def _encode_decode_fwd(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, *static: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    levels, forward_standardized, generators, interpret, config = static
    forward = partial(
        _forward,
        levels=levels,
        forward_standardized=forward_standardized,
        generators=generators,
        interpret=interpret,
        config=config,
    )
    x_hat, saved = dispatch.without_derivative("cayley.encode_decode", forward)(x, mean, std, bias)
    return (x_hat, saved & ID_MASK), (saved, std if forward_standardized else None)


def _encode_decode_bwd(
    levels: Levels,
    forward_standardized: bool,
    generators: Generators,
    interpret: bool,
    config: Config,
    residuals: tuple[jax.Array, jax.Array | None],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None, jax.Array]:
    saved, std = residuals
    dx_hat, _ = cotangents  # ids carry none
    features = 2 ** levels[-1][0]
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
        interpret=interpret,
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
        interpret=interpret,
    )
    return dx.reshape(dx_hat.shape), None, None, dbias


_encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)
