"""Functions without parameters that every part of the model uses."""

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
    """Inside, an implementation that does not serve here is a mistake of who set the model's
    `field` to it.

    `CannotServe` becomes a `UserError` that names the field.
    """
    try:
        yield
    except CannotServe as reason:
        raise UserError(f"model.{field}: {reason}; set it to auto") from None


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and of weights inside matrix products; "auto" is bfloat16 except on
    a CPU backend.
    """
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if current_device().platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


class Observed:
    """A matrix [n, m] in the place of a parameter that adds what `linear` multiplies it with to a
    list. It can do no more.
    """

    def __init__(self, matrix: jax.Array, seen: list[jax.Array]):
        self.matrix, self.seen = matrix, seen

    def __getitem__(self, index: Any) -> "Observed":
        return Observed(self.matrix[index], self.seen)


def linear(x_BTn: jax.Array, *matrices: jax.Array | Observed) -> jax.Array:
    """x times the matrices [n, m_i] side by side, which are rounded to x's dtype first: [B, T, Σ
    m_i], one product.
    """
    for matrix in matrices:
        if isinstance(matrix, Observed):
            matrix.seen.append(x_BTn)
    arrays = [matrix.matrix if isinstance(matrix, Observed) else matrix for matrix in matrices]
    rounded = [array.astype(x_BTn.dtype) for array in arrays]
    return _product(x_BTn, jnp.concatenate(rounded, axis=1) if len(rounded) > 1 else rounded[0])


@jax.custom_vjp
def _product(x_BTn: jax.Array, matrix_nm: jax.Array) -> jax.Array:
    return x_BTn @ matrix_nm


def _product_forward(
    x_BTn: jax.Array, matrix_nm: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x_BTn, matrix_nm), (x_BTn, matrix_nm)


def _product_backward(
    kept: tuple[jax.Array, jax.Array], dy_BTm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTn, matrix_nm = kept
    # jax's own gradient of the matrix is the transpose of [m, n], for which a CPU copies dy,
    # transposed, first
    return dy_BTm @ matrix_nm.T, jnp.einsum("btn,btm->nm", x_BTn, dy_BTm)


_product.defvjp(_product_forward, _product_backward)


def rms_norm(x: jax.Array, eps: float, scale: float = 1.0) -> jax.Array:
    """scale · x / sqrt(mean(x²) + eps) over the last axis of [..., n], without a gain.

    All in float32, the result in x's shape and dtype. Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    x32 = x.astype(jnp.float32)
    return (
        x32 * (scale * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps))
    ).astype(x.dtype)


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(logits / cap): the identity for small logits, never beyond ±cap. Elementwise.
    Gemma 2, arXiv:2408.00118.
    """
    return cap * jnp.tanh(logits / cap)


def per_channel(weights_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Each channel of [B, T, D] times its own weight; float32 weights are rounded to x's dtype
    first.
    """
    return weights_D.astype(x_BTD.dtype)[None, None, :] * x_BTD
