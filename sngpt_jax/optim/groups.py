"""Which rule updates which parameter: the groups, the optimizer built from them, and the table
that shows them.
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
from sngpt_jax.optim import muon, schedules

# Whole path -> group, first match wins. Among the parameters with two axes the matrices of the
# blocks and those behind the bigram and value tables are linear maps that Muon can orthogonalize.
# Tables and sets of per-channel weights are none.
RULES: tuple[tuple[str, str], ...] = (
    (r"(embed|positions)/table", "embed"),
    (r"(bigram|value_embed)/table", "table"),
    (r"blocks/\d+/attn/(query|key|value|out)", "matrix"),
    (r"blocks/\d+/mlp/(up|down)", "matrix"),
    (r"(bigram|value_embed)/proj", "projection"),
    (r"blocks/\d+/(attn_scale|mlp_scale|resid_mix)", "scalar"),
    (r"blocks/\d+/attn/(q_gain|gate_weight|gate_bias|value_mix)", "scalar"),
    (r"blocks/\d+/(attn_norm|mlp_norm)|final_norm", "scalar"),
    (r"blocks/\d+/code/bias", "code_bias"),
    (
        r"skip_weights|smear/gate|bigram/scale|value_embed/(scale|layer_scale)|recycle/(scale|bias)",
        "scalar",
    ),
)


@dataclass(frozen=True)
class Group:
    """How the parameters of one group are updated: W ← (1 - η · weight_decay) W - η · u, η = lr ×
    the run's multiplier.
    """

    rule: Literal["muon", "adam"]  # what makes u of the gradients
    lr: float  # peak learning rate
    weight_decay: float


def groups(config: OptimConfig) -> dict[str, Group]:
    """The groups by name, in the order in which they are shown."""
    matrix = Group("muon", config.muon_lr, config.muon_weight_decay)
    scalar = Group("adam", config.scalar_lr, config.adam_weight_decay)
    return {
        "embed": Group("adam", config.embed_lr, config.adam_weight_decay),
        "table": Group("adam", config.table_lr, config.adam_weight_decay),
        "matrix": matrix,
        "projection": matrix if config.projection_rule == "muon" else scalar,
        "scalar": scalar,
        # most are seldom selected and would only decay
        "code_bias": Group("adam", config.scalar_lr, 0.0),
    }


def group_of(name: str) -> str:
    """The group of the parameter with the path `name`. Raises ValueError where no rule names it."""
    for pattern, group in RULES:
        if re.fullmatch(pattern, name):
            return group
    raise ValueError(
        f"parameter {name} belongs to no optimizer group; add a rule to"
        " sngpt_jax.optim.groups.RULES"
    )


def label(params: optax.Params) -> optax.Params:
    """The tree of `params`, arrays or their abstract shapes, with the name of its group at each
    leaf.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path_name(path)), params)


def clip(grads: optax.Updates, max_norm: float) -> optax.Updates:
    """`grads` scaled down to the global L2 norm `max_norm` where theirs is larger; a `max_norm` of
    0 leaves them alone.

    Where `grad_clip_scope` is global, `make_optimizer` calls it on the mean of the devices'
    gradients. Where it is device, the training step calls it on each device's own gradient before
    they are averaged. Source: Pascanu et al., "On the difficulty of training recurrent neural
    networks" (https://arxiv.org/abs/1211.5063).
    """
    if not max_norm:
        return grads
    clipped, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
    return clipped


def _scale_by_lr_multiplier(rule: Literal["muon", "adam"]) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        lr_multiplier: jax.typing.ArrayLike,
        adam_lr_multiplier: jax.typing.ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        own = (
            adam_lr_multiplier
            if rule == "adam" and adam_lr_multiplier is not None
            else lr_multiplier
        )
        return optax.tree.scale(own, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(
    config: OptimConfig,
    params: optax.Params,
    mesh: Mesh | None = None,
    kept_over: tuple[str, ...] = PARAMETER_AXES,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run whose parameters have the tree of `params`, arrays or their abstract
    shapes.

    `update(grads, state, params, lr_multiplier=…)` clips the gradients' global norm (with
    `grad_clip_scope` = device it leaves that to each device), applies each group's rule, and
    returns what `optax.apply_updates` adds. The scalar `lr_multiplier`, and `adam_lr_multiplier`
    where Adam's groups have another, may be traced: the host computes them for each step
    (`schedules.step_controls`), so a schedule driven by the wall clock compiles nothing anew. With
    `mesh` its devices share out Muon's work; gradients and moments are then laid out by
    `partition_specs(mesh, …, kept_over)`.
    """

    def rule(group: Group) -> optax.GradientTransformation:
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
        decay, scale = optax.add_decayed_weights(group.weight_decay), optax.scale(-group.lr)
        return optax.chain(direction, decay, scale, _scale_by_lr_multiplier(group.rule))

    max_norm = config.grad_clip if config.grad_clip_scope == "global" else 0.0
    clip_all = optax.stateless(lambda grads, _: clip(grads, max_norm))
    labels = label(params)
    present = set(jax.tree.leaves(labels))  # a group without members keeps no state
    by_group = optax.partition(
        {name: rule(group) for name, group in groups(config).items() if name in present}, labels
    )
    return optax.chain(clip_all, by_group)


# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One line of the table: parameters that differ in their layer only."""

    # blocks/* stands for every layer; where only some have such a tensor they are listed,
    # blocks/{7,8}
    path: str
    shape: tuple[int, ...]  # of each of the tensors
    count: int  # tensors
    group: str
    rule: str
    lr: float
    weight_decay: float

    @property
    def parameters(self) -> int:
        """Numbers in all tensors of the row."""
        return self.count * math.prod(self.shape)


_LAYER = re.compile(r"(?<=^blocks/)\d+(?=/)")


def describe(config: OptimConfig, params: optax.Params) -> list[Row]:
    """One row for the tensors that differ in their layer only, by group and in the tree's order;
    `params` may be abstract.
    """
    # the layers of each row; none for a single tensor
    members: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        layers = members.setdefault((group_of(name), _LAYER.sub("*", name), tuple(leaf.shape)), [])
        layers += map(int, _LAYER.findall(name))
    all_layers = {layer for layers in members.values() for layer in layers}

    settings = groups(config)
    rows = []
    for (group, pattern, shape), layers in members.items():
        listed = "{" + ",".join(map(str, sorted(layers))) + "}"
        path_shown = pattern if set(layers) == all_layers else pattern.replace("*", listed)
        rows.append(
            Row(
                path_shown, shape, max(len(layers), 1), group, **dataclasses.asdict(settings[group])
            )
        )
    return sorted(rows, key=lambda row: list(settings).index(row.group))


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text with a heading and the total number of parameters."""
    cells = [("parameter", "shape", "tensors", "parameters", "group", "rule", "lr", "decay")]
    for row in rows:
        shape = "×".join(map(str, row.shape))
        numbers = (
            f"{row.count:,}",
            f"{row.parameters:,}",
            row.group,
            row.rule,
            f"{row.lr:g}",
            f"{row.weight_decay:g}",
        )
        cells.append((row.path, shape, *numbers))
    cells.append(
        (
            "total",
            "",
            f"{sum(r.count for r in rows):,}",
            f"{sum(r.parameters for r in rows):,}",
            "",
            "",
            "",
            "",
        )
    )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.ljust, str.rjust, str.rjust)
    lines = (
        "  ".join(
            put(cell, width) for put, cell, width in zip(align, line, widths, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)
