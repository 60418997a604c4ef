"""The model as pure functions of its variables: initial values, logits, what the head multiplies,
losses.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from sngpt_kernels.dispatch import Device, current_device, targeting

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import loss
from sngpt_jax.model.cayley import Statistic, Taps
from sngpt_jax.model.gpt import GPT
from sngpt_jax.model.pre_norm import PreNormGPT

Params = dict[str, Any]  # nested dicts of float32 arrays, by the model's attribute names


# the same with the statistics of sparse codes in their places: all that a model computes with
Variables = dict[str, Any]


Batch = dict[str, jax.Array]  # "inputs" and "targets", token ids


def join(params: Params, statistics: Params) -> Variables:
    """Two trees of different leaves as one."""
    both = {**statistics, **params}
    return {
        name: (
            join(params[name], statistics[name])
            if name in params and name in statistics
            else both[name]
        )
        for name in both
    }


def _model(config: ModelConfig, key: jax.Array) -> GPT | PreNormGPT:
    rngs = nnx.Rngs(params=key)
    return GPT(config, rngs=rngs) if config.family == "compact" else PreNormGPT(config, rngs=rngs)


def graph(config: ModelConfig) -> Any:
    """The model as `nnx.merge` takes it, to be joined with its variables; its dtypes are those of
    the current device.
    """
    return _graph(config, current_device())


@functools.cache
def _graph(config: ModelConfig, device: Device) -> Any:
    with targeting(device):
        return nnx.graphdef(nnx.eval_shape(lambda: _model(config, jax.random.key(0))))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """The initial parameters that `key` draws. Under `jax.eval_shape` their shapes alone."""
    return nnx.to_pure_dict(nnx.state(_model(config, key), nnx.Param))


def init_statistics(config: ModelConfig) -> Params:
    """The statistics of the sparse codes at the start; nothing where the model has no code."""
    return (
        nnx.to_pure_dict(nnx.state(_model(config, jax.random.key(0)), Statistic))
        if config.levels
        else {}
    )


def abstract_variables(config: ModelConfig) -> Variables:
    """The shapes and dtypes of a model's variables."""
    return jax.eval_shape(
        lambda: join(init_params(config, jax.random.key(0)), init_statistics(config))
    )


@functools.cache
def forward(config: ModelConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The pure function (variables, tokens [B, T]) → logits [B, T, V] of the model that `config`
    describes.
    """
    return lambda variables, tokens_BT: nnx.merge(graph(config), variables)(tokens_BT)


@functools.cache
def hidden(config: ModelConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The pure function (variables, tokens [B, T]) → what the head multiplies [B, T, D]."""
    return lambda variables, tokens_BT: nnx.merge(graph(config), variables).hidden(tokens_BT)


@functools.cache
def losses(config: ModelConfig) -> Callable[[Variables, jax.Array, jax.Array], jax.Array]:
    """The pure function (variables, inputs [B, T], targets [B, T]) → cross-entropy in nats [B, T],
    float32.
    """
    apply = tapped_losses(config)
    return lambda variables, inputs_BT, targets_BT: apply(
        variables, inputs_BT, targets_BT, jnp.arange(0)
    )[0]


Tapped = Callable[[Variables, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Taps | None]]


@functools.cache
def tapped_losses(config: ModelConfig) -> Tapped:
    """`losses` that takes positions [P] too, and gives what the sparse codes saw there besides;
    None without codes.
    """
    return with_taps(config, loss.token_losses)


def with_taps(config: ModelConfig, cross_entropy: Callable[..., jax.Array]) -> Tapped:
    def apply(
        variables: Variables, inputs_BT: jax.Array, targets_BT: jax.Array, tapped_P: jax.Array
    ) -> tuple[jax.Array, Taps | None]:
        chex.assert_equal_shape((inputs_BT, targets_BT))
        model = nnx.merge(graph(config), variables)
        inputs_BT, targets_BT = inputs_BT.astype(jnp.int32), targets_BT.astype(jnp.int32)
        x_BTD, taps = (
            model.tapped_hidden(inputs_BT, tapped_P)
            if config.levels
            else (model.hidden(inputs_BT), None)
        )
        with jax.named_scope("head"):
            cap, chunk = config.logit_soft_cap, config.logit_chunk
            return (
                cross_entropy(x_BTD, model.embed.table[...], targets_BT, cap=cap, chunk=chunk),
                taps,
            )

    return apply
