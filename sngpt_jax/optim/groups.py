"""The rule that updates each group of parameters, and the table that shows it.

`config.parameters` assigns each parameter to a group.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import PARAMETER_AXES, path_name
from sngpt_jax.config import OptimConfig
from sngpt_jax.config.parameters import OptimizerGroup, parameter
from sngpt_jax.optim import muon, schedules, stacks

Rule = Literal["muon", "adam"]


@dataclass(frozen=True)
class UpdateRule:
    """W ← (1 - η · weight_decay) W - η · u, with η = lr times the run's multiplier."""

    rule: Rule  # computes u from the gradients
    lr: float  # peak learning rate
    weight_decay: float


def groups(config: OptimConfig) -> dict[OptimizerGroup, UpdateRule]:
    """How each group changes, in the order of the table."""
    decay = config.adam_weight_decay
    matrix = UpdateRule("muon", config.muon_lr, config.muon_weight_decay)
    scalar = UpdateRule("adam", config.scalar_lr, decay)
    return {
        "embed": UpdateRule("adam", config.embed_lr, decay),
        "table": UpdateRule("adam", config.table_lr, decay),
        "matrix": matrix,
        "projection": matrix if config.projection_rule == "muon" else scalar,
        "scalar": scalar,
        # most biases are rarely selected, so that a decay would be all that changes them
        "code_bias": UpdateRule("adam", config.scalar_lr, 0.0),
    }


def group_of(path: str) -> OptimizerGroup:
    """The group of the parameter at `path`. Raises ValueError if it is no known parameter."""
    if group := parameter(path).optimizer:
        return group
    raise ValueError(f"{path} is a statistic, which no optimizer updates")


def label(params: optax.Params) -> optax.Params:
    """The tree of `params`, real or abstract, with the name of its group at each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path_name(path)), params)


def global_norm(tree: optax.Updates) -> jax.Array:
    """The L2 norm of all arrays in `tree` together.

    Arrays of equal shape are squared and added up element by element before one sum over the
    elements. A sum per array would launch a kernel or two for each parameter.
    """
    alike: dict[tuple[int, ...], jax.Array] = {}
    for leaf in jax.tree.leaves(tree):
        alike[leaf.shape] = jnp.square(leaf) + alike.get(leaf.shape, 0.0)
    return jnp.sqrt(sum((jnp.sum(squares) for squares in alike.values()), jnp.zeros(())))


def clip(grads: optax.Updates, max_norm: float) -> optax.Updates:
    """`grads` scaled down to the global L2 norm `max_norm` if theirs is larger; 0: unchanged.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks"
    (https://arxiv.org/abs/1211.5063).
    """
    if not max_norm:
        return grads
    norm = global_norm(grads)
    return jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), grads)


def _scale_by_learning_rate(group: UpdateRule) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        lr_multiplier: jax.typing.ArrayLike,
        adam_lr_multiplier: jax.typing.ArrayLike,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        multiplier = adam_lr_multiplier if group.rule == "adam" else lr_multiplier
        return optax.tree.scale(stacks.read_by_all(-group.lr * multiplier), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(
    config: OptimConfig,
    params: optax.Params,
    mesh: Mesh | None = None,
    kept_over: tuple[str, ...] = PARAMETER_AXES,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run with the tree of `params`, real or abstract.

    `update(grads, state, params, lr_multiplier=…, adam_lr_multiplier=…)` clips the gradients'
    global norm (unless `grad_clip_scope` = device), applies each group's rule, and returns what
    `optax.apply_updates` adds. The multipliers of `schedules.step_controls` may be traced. With
    `mesh` the devices share Muon's work; gradients and moments then lie as `partition_specs(mesh,
    …, kept_over)` says.
    """

    def transformation(group: UpdateRule) -> optax.GradientTransformation:
        if group.rule == "muon":
            direction = muon.scale_by_muon(
                schedules.muon_momentum(config),
                config.newton_schulz_steps,
                jnp.dtype(config.newton_schulz_dtype),
                jnp.dtype(config.muon_momentum_dtype),
                coefficients=config.muon_coefficients,
                neuron_beta2=config.normuon_beta2,
                mesh=mesh,
                kept_over=kept_over,
            )
        else:
            direction = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
        decay = optax.add_decayed_weights(group.weight_decay)
        # the third has nothing to do; checkpoints number the members of the chain
        return optax.chain(direction, decay, optax.identity(), _scale_by_learning_rate(group))

    max_norm = config.grad_clip if config.grad_clip_scope == "global" else 0.0
    clip_all = optax.stateless(lambda grads, _: clip(grads, max_norm))
    labels = label(params)
    present = set(jax.tree.leaves(labels))  # a group without members keeps no state
    rules = {name: transformation(x) for name, x in groups(config).items() if name in present}
    return optax.chain(clip_all, optax.partition(rules, labels))


# ------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """One line of the table: parameters that differ only in their layer."""

    # blocks/* stands for every layer; blocks/{7,8} lists the layers that have the tensor
    path: str
    shape: tuple[int, ...]  # of each tensor
    count: int  # tensors
    group: OptimizerGroup
    rule: str
    lr: float
    weight_decay: float

    @property
    def parameters(self) -> int:
        return self.count * math.prod(self.shape)


_LAYER = re.compile(r"(?<=^blocks/)\d+(?=/)")


def describe(config: OptimConfig, params: optax.Params) -> list[Row]:
    """The rows of `params`, real or abstract, by group and in the tree's order."""
    # layers by row; empty for a single tensor
    members: dict[tuple[OptimizerGroup, str, tuple[int, ...]], list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        key = (group_of(name), _LAYER.sub("*", name), tuple(leaf.shape))
        members.setdefault(key, []).extend(map(int, _LAYER.findall(name)))
    all_layers = {layer for layers in members.values() for layer in layers}

    settings = groups(config)
    rows = []
    for (group, pattern, shape), layers in members.items():
        listed = "{" + ",".join(map(str, sorted(layers))) + "}"
        shown = pattern if set(layers) == all_layers else pattern.replace("*", listed)
        rule = dataclasses.asdict(settings[group])
        rows.append(Row(shown, shape, max(len(layers), 1), group, **rule))
    return sorted(rows, key=lambda row: list(settings).index(row.group))


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text with a heading and the total number of parameters."""
    cells = [("parameter", "shape", "tensors", "parameters", "group", "rule", "lr", "decay")]
    for row in rows:
        shape, rates = "×".join(map(str, row.shape)), (f"{row.lr:g}", f"{row.weight_decay:g}")
        sizes = f"{row.count:,}", f"{row.parameters:,}"
        cells.append((row.path, shape, *sizes, row.group, row.rule, *rates))
    total = f"{sum(row.count for row in rows):,}", f"{sum(row.parameters for row in rows):,}"
    cells.append(("total", "", *total, "", "", "", ""))
    columns = zip("<<>><<>>", *cells, strict=True)
    formats = [f"{side}{max(map(len, texts))}" for side, *texts in columns]
    lines = ("  ".join(map(format, line, formats)).rstrip() for line in cells)
    return "\n".join(lines)
