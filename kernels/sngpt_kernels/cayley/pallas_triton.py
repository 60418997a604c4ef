"""The operation as Pallas Triton kernels for NVIDIA GPUs.

A program of the forward kernel has one warp. It encodes a token (`pallas_encode`), decodes it
(`pallas_lookup`) and goes on to the next. Ids and coefficients pass through memory, because a
thread needs values that another thread chose.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl

from sngpt_kernels import dispatch
from sngpt_kernels.cayley import pallas_backward, pallas_constants, pallas_encode, pallas_lookup
from sngpt_kernels.cayley.dictionary import STD_FLOOR, Scheme
from sngpt_kernels.cayley.folding import fold
from sngpt_kernels.cayley.pallas_decode import Config
from sngpt_kernels.cayley.pallas_select import Output, Work
from sngpt_kernels.cayley.xla import ID_MASK, Code, Saved
from sngpt_kernels.launch import launch

check = pallas_constants.check

TRIP = 16  # see `pallas_lookup.combine`


@dataclass(frozen=True)
class _Static:
    """The static arguments of a call."""

    scheme: Scheme
    config: Config
    interpret: bool


def encode_decode(
    x: Array,
    mean: Array,
    std: Array,
    bias: Array,
    scheme: Scheme,
    *,
    interpret: bool = False,
    config: Config | None = None,
) -> Code:
    """`api.encode_decode` of arguments that `check` accepts. `interpret` serves any device."""
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
    *work_refs: Any,
    static: _Static,
) -> None:
    (rows, d), tokens = x_ref.shape, static.config.forward_tokens
    first_row = pl.program_id(0) * tokens
    work = Work._make((pl.program_id(0), *work_refs, static.interpret))

    def code(token: Array, _: None) -> None:
        row = first_row + token
        out = Output(row, saved_ref, c_ref, static.interpret)
        pallas_encode.encode_token(out, work, x_ref, constant_refs, table_refs, static.scheme)
        # Threads read ids and coefficients that other threads stored.
        pallas_encode.barrier(static.interpret)
        sums = pallas_lookup.combine(row, c_ref, saved_ref, words_ref, TRIP, static.interpret)
        root = np.float32(d**-0.5)
        pallas_lookup.store(x_hat_ref, row, tuple(p_sums * root for p_sums in sums))

    lax.fori_loop(0, jnp.minimum(tokens, rows - first_row), code, None)


def _forward(
    x: Array, mean: Array, std: Array, bias: Array, static: _Static
) -> tuple[Array, Array]:
    """x_hat like x, and the saved ids [..., A]."""
    scheme = static.scheme
    levels, d, active, rows = scheme.levels, scheme.width, scheme.active, x.size // scheme.width
    if rows == 0:
        return x, jnp.zeros((*x.shape[:-1], active), jnp.int32)
    constants = pallas_constants.constants(scheme)
    tables = pallas_constants.tables(mean, std, bias, scheme)
    words = pallas_lookup.table(d, bias.shape[0])
    scored = sum(
        levels[level - 1][1] * fold(levels, scheme.generators, level).member_steps.size
        for level in range(1, len(levels))
    )
    programs = pl.cdiv(rows, static.config.forward_tokens)
    pieces = 1 if x.dtype == jnp.bfloat16 else 3
    parents = pallas_constants.most_parents(levels)
    found = programs, pallas_constants.list_size(levels, scheme.generators)
    x_hat, saved, *_ = launch(
        "cayley_forward",
        partial(_forward_kernel, static=static),
        (programs,),
        (x.reshape(rows, d), constants, tables, words),
        (
            ShapeDtypeStruct((rows, d), x.dtype),
            ShapeDtypeStruct((rows, active), jnp.int32),
            ShapeDtypeStruct((rows, active), jnp.float32),  # c: scratch
            ShapeDtypeStruct(found, jnp.int32),
            ShapeDtypeStruct(found, jnp.float32),
            ShapeDtypeStruct((programs, pieces * d // 2), jnp.int32),
            ShapeDtypeStruct((programs, parents), jnp.int32),
            ShapeDtypeStruct((programs, parents * d // 32), jnp.int32),
        ),
        flops=2 * rows * (active + scored) * d,
        num_warps=1,
        interpret=static.interpret,
    )
    return x_hat.reshape(x.shape), saved.reshape(*x.shape[:-1], active)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _encode_decode(x: Array, mean: Array, std: Array, bias: Array, static: _Static) -> Code:
    x_hat, saved = _forward(x, mean, std, bias, static)
    return x_hat, saved & ID_MASK


def _encode_decode_fwd(
    x: Array, mean: Array, std: Array, bias: Array, static: _Static
) -> tuple[Code, Saved]:
    forward = dispatch.without_derivative("cayley.encode_decode", partial(_forward, static=static))
    x_hat, saved = forward(x, mean, std, bias)
    return (x_hat, saved & ID_MASK), (saved, std if static.scheme.forward_standardized else None)


def _encode_decode_bwd(
    static: _Static, residuals: Saved, cotangents: Code
) -> tuple[Array, None, None, Array]:
    (saved, std), features = residuals, static.scheme.features
    dx_hat, _ = cotangents  # ids carry none
    if dx_hat.size == 0:
        return dx_hat, None, None, jnp.zeros(features, jnp.float32)
    saved = saved.reshape(-1, saved.shape[-1])
    if std is None:
        inverse_std = jnp.ones(features, jnp.float32)
    else:
        inverse_std = 1 / jnp.maximum(std, STD_FLOOR)
    backward = partial(pallas_backward.backward, static.interpret)
    underivable = dispatch.without_derivative("cayley.encode_decode", backward)
    dx, g = underivable(dx_hat.reshape(-1, dx_hat.shape[-1]), saved, inverse_std)
    dbias = pallas_backward.bias_gradient(static.config, static.interpret, saved, g, features)
    return dx.reshape(dx_hat.shape), None, None, dbias


_encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)
