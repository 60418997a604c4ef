"""The CayleySAE layer: a sparse code of an MLP's input over an algebraic dictionary.

A layer learns one bias per feature. Its statistics receive no gradient: each optimizer step updates
them from a sample of its tokens, the `Taps`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from sngpt_kernels.cayley import api, xla
from sngpt_kernels.cayley.dictionary import STD_FLOOR

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.layers import chosen_by

DECAY = 0.99  # of the running mean and standard deviation, per step
SAMPLE_TOKENS = 1024  # fewest tokens of a step in its sample, unless the step has fewer


class Statistic(nnx.Variable[jax.Array]):
    """State of the model that a step updates without a gradient."""


class Taps(NamedTuple):
    """What every layer's code saw, at P positions of each sequence."""

    x: jax.Array  # [L, B, P, D], in the compute dtype
    ids: jax.Array  # int32 [L, B, P, A], the active features, level by level


class CodeState(NamedTuple):
    """The parameters and statistics of all layers' codes with F features each."""

    mean: jax.Array  # [L, D] of the input
    std: jax.Array  # [L, F] of each feature's score
    bias: jax.Array  # [L, F]
    last_fired: jax.Array  # int32 [L, F], last step whose sample used the feature; 0: none


class CayleySAE(nnx.Module):
    """x [..., D] → its reconstruction by a sparse code, and the active features' ids [..., A].

    The bias starts at 0, the mean at 0 and the standard deviation at 1. Source: arXiv:2607.20652.
    """

    def __init__(self, config: ModelConfig):
        self.levels = config.levels
        self.generators, self.forward_standardized = config.generators, config.forward_standardized
        self.implementation = None if config.code == "auto" else config.code
        F = 2 ** self.levels[-1][0]
        self.bias = nnx.Param(jnp.zeros((F,)))
        self.mean = Statistic(jnp.zeros((config.d_model,)))
        self.std = Statistic(jnp.ones((F,)))
        self.last_fired = Statistic(jnp.zeros((F,), jnp.int32))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        with chosen_by("code"):
            return api.encode_decode(
                x,
                self.mean[...],
                self.std[...],
                self.bias[...],
                self.levels,
                forward_standardized=self.forward_standardized,
                generators=self.generators,
                implementation=self.implementation,
            )


def activations(config: ModelConfig, taps: Taps, code: CodeState) -> tuple[jax.Array, jax.Array]:
    """Standardized scores z and coefficients c of one layer's active features, float32 [..., A].

    z = ⟨x - mean, v⟩ / max(std, 10⁻³), without the bias. `taps` and `code` have no dimension L.
    """
    mu_F = xla.all_scores(code.mean, config.levels[-1][0])
    score = xla.scores_at(taps.x, taps.ids) - mu_F[taps.ids]
    z = score / jnp.maximum(code.std[taps.ids], STD_FLOOR)
    return z, jnp.maximum((z if config.forward_standardized else score) + code.bias[taps.ids], 0)


# ------------------------------------------------------------------------------ statistics


def code_state(variables: dict[str, Any]) -> CodeState:
    """The codes of all layers in a model's variables, stacked."""
    return CodeState(*(_stacked(variables, name) for name in CodeState._fields))


def _stacked(variables: dict[str, Any], name: str) -> jax.Array:
    return jnp.stack([block["code"][name] for block in variables["blocks"].values()])


def sample_positions(key: jax.Array, step: jax.Array, seq_len: int, sequences: int) -> jax.Array:
    """The positions in the sample of `step`, int32 [P], equal in every sequence.

    They are ⌈1024 / sequences⌉ of `seq_len`, drawn at random without repetition.
    """
    count = min(seq_len, math.ceil(SAMPLE_TOKENS / sequences))
    return jax.random.choice(jax.random.fold_in(key, step), seq_len, (count,), replace=False)


def update_statistics(
    statistics: dict[str, Any], taps: Taps, step: jax.Array, axis_names: tuple[str, ...]
) -> dict[str, Any]:
    """The statistics after the optimizer step number `step`. `taps` is this device's part of the
    step's sample. Must be called inside a `shard_map` over `axis_names`.

    mean ← 0.99 mean + 0.01 m and std ← 0.99 std + 0.01 s; m is the sample's mean input, and s the
    standard deviation of each feature's score around the sample's mean score.
    """
    codes = [block["code"] for block in statistics["blocks"].values()]
    layers, features = len(codes), codes[0]["std"].size
    x_LND = taps.x.reshape(layers, -1, taps.x.shape[-1]).astype(jnp.float32)
    mean_LD = jax.lax.pmean(jnp.mean(x_LND, axis=1), axis_names)
    squares_LF = xla.sum_squared_scores(x_LND - mean_LD[:, None], int(math.log2(features)))
    std_LF = jnp.sqrt(jax.lax.pmean(squares_LF / x_LND.shape[1], axis_names))
    ids = taps.ids.reshape(layers, -1)
    fired_LF = jnp.zeros((layers, features), jnp.int32).at[jnp.arange(layers)[:, None], ids].set(1)
    fired_LF = jax.lax.pmax(fired_LF, axis_names)

    # from the arrays of one layer each, which the results overwrite in place
    new = [
        {
            "mean": DECAY * old["mean"] + (1 - DECAY) * mean_D,
            "std": DECAY * old["std"] + (1 - DECAY) * std_F,
            "last_fired": jnp.where(fired_F > 0, step, old["last_fired"]),
        }
        for old, mean_D, std_F, fired_F in zip(codes, mean_LD, std_LF, fired_LF, strict=True)
    ]
    blocks = zip(statistics["blocks"], new, strict=True)
    return {"blocks": {name: {"code": code} for name, code in blocks}}
