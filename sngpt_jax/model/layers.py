"""Functions without parameters that all parts of the model use."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from sngpt_kernels.dispatch import CannotServe, current_device

from sngpt_jax.base.errors import UserError
from sngpt_jax.config import ModelConfig


@contextlib.contextmanager
def chosen_by(field: str) -> Iterator[None]:
    """Turns `CannotServe` into a `UserError` that names the model's `field`, which chose."""
    try:
        yield
    except CannotServe as reason:
        raise UserError(f"model.{field}: {reason}; set it to auto") from None


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and of weights in matrix products; auto: float32 on a CPU, bfloat16
    elsewhere.
    """
    automatic = "float32" if current_device().platform == "cpu" else "bfloat16"
    return jnp.dtype(automatic if config.compute_dtype == "auto" else config.compute_dtype)


class Observed:
    """A matrix [n, m] in the place of a parameter; `linear` appends its inputs to `seen`."""

    def __init__(self, matrix: jax.Array, seen: list[jax.Array]):
        self.matrix, self.seen = matrix, seen

    def __getitem__(self, index: Any) -> "Observed":
        return Observed(self.matrix[index], self.seen)


def linear(
    x_BTn: jax.Array, *matrices: jax.Array | Observed, gain: jax.Array | None = None
) -> jax.Array:
    """x times the matrices [n, m_i] side by side, in x's dtype: one product, [B, T, Σ m_i].

    `gain` [m_i] multiplies the columns of each matrix. So the result needs no pass of its own.
    """
    rounded = []
    for matrix in matrices:
        if isinstance(matrix, Observed):
            matrix.seen.append(x_BTn)
            matrix = matrix.matrix
        rounded.append(operand(matrix, x_BTn.dtype, gain))
    return _product(x_BTn, jnp.concatenate(rounded, axis=1) if len(rounded) > 1 else rounded[0])


def operand(matrix_nm: jax.Array, dtype: jnp.dtype, gain: jax.Array | None = None) -> jax.Array:
    """The matrix as a product takes it: its columns times `gain` [m], rounded to `dtype`."""
    return (matrix_nm if gain is None else matrix_nm * gain[None, :]).astype(dtype)


@jax.custom_vjp
def _product(x_BTn: jax.Array, matrix_nm: jax.Array) -> jax.Array:
    return x_BTn @ matrix_nm


_product.defvjp(
    lambda x_BTn, matrix_nm: (x_BTn @ matrix_nm, (x_BTn, matrix_nm)),
    # jax's own gradient of the matrix is the transpose of [m, n]; a CPU then copies dy transposed
    lambda kept, dy_BTm: (dy_BTm @ kept[1].T, jnp.einsum("btn,btm->nm", kept[0], dy_BTm)),
)


def rms_norm(x: jax.Array, eps: float, scale: float = 1.0) -> jax.Array:
    """scale · x / sqrt(mean(x²) + eps) over the last axis of [..., n], without a gain.

    Computed in float32; the result has x's dtype. Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * (scale * inverse)).astype(x.dtype)


def weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """x times weights that broadcast to it, computed in float32 and rounded to x's dtype.

    The gradient of the weights then adds float32 numbers. On a GPU a sum in bfloat16 adds in
    bfloat16. XLA joins the conversions to the passes that are there.
    """
    return (weights * x.astype(jnp.float32)).astype(x.dtype)


def per_channel(weights_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Each channel of [B, T, D] times its weight, rounded to x's dtype."""
    return weighted(weights_D[None, None, :], x_BTD)
