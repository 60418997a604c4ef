"""What a recipe costs: parameters, FLOPs and bytes, from its shapes alone."""

import math
import re
from collections import defaultdict
from typing import Any

import jax
from sngpt_kernels.cayley import dictionary

from sngpt_jax.cluster.mesh import make_mesh, path_name
from sngpt_jax.config import Config
from sngpt_jax.model.forward import Params, init_params
from sngpt_jax.optim.groups import describe
from sngpt_jax.optim.muon import newton_schulz_flops
from sngpt_jax.training.state import abstract_state


def abstract_params(config: Config) -> Params:
    """The parameters' shapes and dtypes."""
    return jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))


_GROUPS = (  # the first pattern that a parameter's path matches
    (r"embed/table", "embed"),
    (r"positions/table", "positions"),
    (r"blocks/\d+/code/bias", "sae_bias"),
    (r"bigram/.*", "bigram"),
    (r"value_embed/.*", "value_embed"),
    (r"blocks/\d+/mlp/.*", "mlp"),
    (r"blocks/\d+/attn/(query|key|value|out|gate_weight)", "attention"),
    (r".*", "control"),
)


def parameter_groups(params: Params) -> dict[str, int]:
    """Parameters by group, those that there are: embed, positions, sae_bias (of sparse codes),
    bigram, value_embed, attention, mlp, and the vectors that scale and mix (control)."""
    groups: dict[str, int] = defaultdict(int)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        groups[next(group for pattern, group in _GROUPS if re.fullmatch(pattern, name))] += (
            math.prod(leaf.shape)
        )
    return dict(groups)


def forward_flops_per_token(config: Config) -> int:
    """Floating-point operations of one token's forward pass: two a multiply-add.

    Matrix products (the head's included, lookups not), once for each time that a block is applied,
    and causal attention, where a position sees (T + 1) / 2 keys on average. Element-wise work is
    left out, as in the usual model-FLOPs count; a training step takes three times as many (a
    backward pass is two forward ones).
    """
    m, T = config.model, config.data.seq_len
    uses = {str(layer): 1 + m.recycle_layers.count(layer) for layer in range(m.num_layers)}
    multiplied = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        name = path_name(path)
        if re.fullmatch(r"embed/table|(bigram|value_embed)/proj", name):
            multiplied += math.prod(leaf.shape)
        elif matrix := re.fullmatch(
            r"blocks/(\d+)/(attn|mlp)/(query|key|value|out|gate_weight|up|down)", name
        ):
            multiplied += uses[matrix[1]] * math.prod(leaf.shape)
    return 2 * multiplied + sum(uses.values()) * 2 * 2 * m.num_heads * m.head_dim * (T + 1) // 2


def code_flops_per_token(config: Config) -> int:
    """Additions and multiplications of the sparse codes in one token's forward pass, as
    `sngpt_kernels.cayley.xla` does them.

    A transform for level 0, a product with a ±1 matrix for each parent of a later level, and the
    sum of the active atoms. They are no part of the model FLOPs, which utilization is reckoned
    with: `pallas_triton` takes an eighth of the products.
    """
    m = config.model
    if not m.levels:
        return 0
    d, levels = m.d_model, m.cayley_levels
    bits = d.bit_length() - 1
    total = 2 * d * (2 ** (bits // 2) + 2 ** (bits - bits // 2)) + 2 * d * sum(
        k for _, k, _ in levels
    )
    for level in range(1, len(levels)):
        total += (
            2
            * d
            * levels[level - 1][1]
            * len(dictionary.children(levels, m.generators, level).steps)
        )
    return m.num_layers * total


def optimizer_flops(config: Config) -> int:
    """Floating-point operations of one step's orthogonalizations, over all matrices."""
    return sum(
        row.count * newton_schulz_flops(row.shape, config.optim.newton_schulz_steps)
        for row in describe(config.optim, abstract_params(config))
        if row.rule == "muon"
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make_plan(config: Config) -> dict[str, Any]:
    """The figures that the command prints, as nested plain values."""
    state = abstract_state(config, make_mesh())
    groups = {"positions": 0, "sae_bias": 0, **parameter_groups(state.params)}
    total, positions, sae_bias = sum(groups.values()), groups["positions"], groups["sae_bias"]
    forward = forward_flops_per_token(config)
    parameters, optimizer, averages = (
        _bytes(state.params),
        _bytes(state.opt_state),
        _bytes((state.ema, state.swa)),
    )
    statistics = _bytes(state.statistics)
    return {
        "parameters": {"total": total, "backbone": total - positions - sae_bias, **groups},
        "flops_per_token": {
            "forward": forward,
            "train": 3 * forward,
            "code": code_flops_per_token(config),
        },
        "flops_per_step": {
            "model": 3 * forward * config.data.batch_tokens,
            "optimizer": optimizer_flops(config),
        },
        "bytes": {
            "parameters": parameters,
            "optimizer": optimizer,
            "averages": averages,
            "statistics": statistics,
            "checkpoint": parameters + optimizer + averages + statistics,
        },
        "tokens": {
            "step": config.data.batch_tokens,
            "run": config.data.batch_tokens * config.train.steps,
        },
    }
