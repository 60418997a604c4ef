"""The model as pure functions of its variables: initial values, logits, final states, losses."""

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
from sngpt_jax.model.gpt import GPT, LanguageModel
from sngpt_jax.model.pre_norm import PreNormGPT

Params = dict[str, Any]  # nested dicts of float32 arrays, named as the model's attributes
Variables = dict[str, Any]  # parameters and the statistics of sparse codes
Batch = dict[str, jax.Array]  # "inputs" and "targets": token ids


def join(params: Params, statistics: Params) -> Variables:
    """Merges two trees that share no leaf."""
    shared = params.keys() & statistics.keys()
    return {
        **statistics,
        **params,
        **{name: join(params[name], statistics[name]) for name in shared},
    }


def _model(config: ModelConfig, key: jax.Array) -> LanguageModel:
    family = GPT if config.family == "compact" else PreNormGPT
    return family(config, rngs=nnx.Rngs(params=key))


def _parts(model: LanguageModel) -> tuple[Any, Params, Params]:
    """The graph of the model, its parameters, and its statistics."""
    graphdef, *states = nnx.split(model, nnx.Param, Statistic)
    params, statistics = map(nnx.to_pure_dict, states)
    return graphdef, params, statistics


@functools.cache
def _abstract(config: ModelConfig, device: Device) -> tuple[Any, Params, Params]:
    with targeting(device):
        return _parts(nnx.eval_shape(lambda: _model(config, jax.random.key(0))))


def graph(config: ModelConfig) -> Any:
    """The model without its variables, for `nnx.merge`; the current device decides its dtypes."""
    return _abstract(config, current_device())[0]


def abstract_parts(config: ModelConfig) -> tuple[Params, Params]:
    """The shapes and dtypes of a model's parameters, and of its statistics."""
    return _abstract(config, current_device())[1:]


def abstract_variables(config: ModelConfig) -> Variables:
    """The shapes and dtypes of a model's variables."""
    return join(*abstract_parts(config))


def init_variables(config: ModelConfig, key: jax.Array) -> tuple[Params, Params]:
    """The initial parameters, drawn from `key`, and the initial statistics of the sparse codes."""
    return _parts(_model(config, key))[1:]


@functools.cache
def forward(config: ModelConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The pure function (variables, tokens [B, T]) → logits [B, T, V], float32."""
    return lambda variables, tokens_BT: nnx.merge(graph(config), variables)(tokens_BT)


@functools.cache
def hidden(config: ModelConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The pure function (variables, tokens [B, T]) → the vectors [B, T, D] that the head takes."""
    return lambda variables, tokens_BT: nnx.merge(graph(config), variables).hidden(tokens_BT)


@functools.cache
def losses(config: ModelConfig) -> Callable[[Variables, jax.Array, jax.Array], jax.Array]:
    """The pure function (variables, inputs [B, T], targets [B, T]) → cross-entropy [B, T] in nats,
    float32.
    """
    apply = tapped_losses(config)
    return lambda variables, inputs_BT, targets_BT: apply(
        variables, inputs_BT, targets_BT, jnp.arange(0)
    )[0]


Tapped = Callable[[Variables, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Taps | None]]


@functools.cache
def tapped_losses(config: ModelConfig) -> Tapped:
    """As `losses`, with positions [P] as a further argument and the codes' `Taps` there (None if
    the model has no code) as a further result.
    """
    return with_taps(config, loss.token_losses)


def with_taps(config: ModelConfig, cross_entropy: Callable[..., jax.Array]) -> Tapped:
    """As `tapped_losses`, with another function of `model.loss` for the cross-entropy."""

    def apply(
        variables: Variables, inputs_BT: jax.Array, targets_BT: jax.Array, tapped_P: jax.Array
    ) -> tuple[jax.Array, Taps | None]:
        chex.assert_equal_shape((inputs_BT, targets_BT))
        model = nnx.merge(graph(config), variables)
        inputs_BT, targets_BT = inputs_BT.astype(jnp.int32), targets_BT.astype(jnp.int32)
        x_BTD, taps = model.tapped_hidden(inputs_BT, *(tapped_P,) * bool(config.levels))
        with jax.named_scope("head"):
            cap, chunk = config.logit_soft_cap, config.logit_chunk
            table_VD = model.embed.table[...]
            return cross_entropy(x_BTD, table_VD, targets_BT, cap=cap, chunk=chunk), taps

    return apply
