"""What a recipe costs before it runs: `python -m sngpt_jax.plan --config golf_baseline [--topology h100x8]`.

Counts follow from the shapes alone. With a topology the training step is compiled for it too (`topology.py`). Nothing is
computed on a device.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kernels.cayley import dictionary
from sngpt_jax import cli, topology
from sngpt_jax.config import Config
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.optim.muon import newton_schulz_flops
from sngpt_jax.options import Json, Quiet
from sngpt_jax.parallel import make_mesh, path_name
from sngpt_jax.recipe import Overrides, parse_command
from sngpt_jax.step import Params, abstract_state, init_params


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
    """Parameters by group, those that there are: embed, positions, sae_bias (of sparse codes), bigram, value_embed,
    attention, mlp, and the vectors that scale and mix (control)."""
    groups: dict[str, int] = defaultdict(int)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        groups[next(group for pattern, group in _GROUPS if re.fullmatch(pattern, name))] += math.prod(leaf.shape)
    return dict(groups)


def forward_flops_per_token(config: Config) -> int:
    """Floating-point operations of one token's forward pass: two a multiply-add.

    Matrix products (the head's included, lookups not), once for each time that a block is applied, and causal attention,
    where a position sees (T + 1) / 2 keys on average. Element-wise work is left out, as in the usual model-FLOPs count; a
    training step takes three times as many (a backward pass is two forward ones).
    """
    m, T = config.model, config.data.seq_len
    uses = {str(layer): 1 + m.recycle_layers.count(layer) for layer in range(m.num_layers)}
    multiplied = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        name = path_name(path)
        if re.fullmatch(r"embed/table|(bigram|value_embed)/proj", name):
            multiplied += math.prod(leaf.shape)
        elif matrix := re.fullmatch(r"blocks/(\d+)/(attn|mlp)/(query|key|value|out|gate_weight|up|down)", name):
            multiplied += uses[matrix[1]] * math.prod(leaf.shape)
    return 2 * multiplied + sum(uses.values()) * 2 * 2 * m.num_heads * m.head_dim * (T + 1) // 2


def code_flops_per_token(config: Config) -> int:
    """Additions and multiplications of the sparse codes in one token's forward pass, as `kernels.cayley.xla` does them.

    A transform for level 0, a product with a ±1 matrix for each parent of a later level, and the sum of the active atoms.
    They are no part of the model FLOPs, which utilization is reckoned with: `pallas_triton` takes an eighth of the products.
    """
    m = config.model
    if not m.levels:
        return 0
    d, levels = m.d_model, m.cayley_levels
    bits = d.bit_length() - 1
    total = 2 * d * (2 ** (bits // 2) + 2 ** (bits - bits // 2)) + 2 * d * sum(k for _, k, _ in levels)
    for level in range(1, len(levels)):
        total += 2 * d * levels[level - 1][1] * len(dictionary.children(levels, m.generators, level).steps)
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
    parameters, optimizer, averages = _bytes(state.params), _bytes(state.opt_state), _bytes((state.ema, state.swa))
    statistics = _bytes(state.statistics)
    return {
        "parameters": {"total": total, "backbone": total - positions - sae_bias, **groups},
        "flops_per_token": {"forward": forward, "train": 3 * forward, "code": code_flops_per_token(config)},
        "flops_per_step": {"model": 3 * forward * config.data.batch_tokens, "optimizer": optimizer_flops(config)},
        "bytes": {
            "parameters": parameters,
            "optimizer": optimizer,
            "averages": averages,
            "statistics": statistics,
            "checkpoint": parameters + optimizer + averages + statistics,
        },
        "tokens": {"step": config.data.batch_tokens, "run": config.data.batch_tokens * config.train.steps},
    }


def format_plan(config: Config, plan: dict[str, Any]) -> str:
    """The plan for a person."""
    p, f, b, t = plan["parameters"], plan["flops_per_token"], plan["bytes"], plan["tokens"]
    shares = ", ".join(f"{name} {count:,}" for name, count in p.items() if name not in ("total", "backbone") and count)
    backbone = f"; backbone {p['backbone']:,}" if p["backbone"] != p["total"] else ""
    step, run = plan["flops_per_step"], config.train.steps
    lines = [
        f"parameters   {p['total']:,} ({shares}){backbone}",
        f"FLOPs        {f['forward'] / 1e6:,.1f} M a token forward, {f['train'] / 1e6:,.1f} M in training"
        + (f"; beside them the codes' {f['code'] / 1e6:,.1f} M forward" if f["code"] else ""),
        f"step         {t['step']:,} tokens, {step['model'] / 1e12:,.3f} TFLOP"
        f" and {step['optimizer'] / 1e12:,.3f} TFLOP to orthogonalize"
        f" ({step['optimizer'] / (step['model'] + step['optimizer']):.2%} of both)",
        f"run          {run:,} steps, {t['run'] / 1e9:,.3f} G tokens, {step['model'] * run / 1e18:,.4f} EFLOP",
        f"memory       in all: parameters {b['parameters'] / 1e6:,.1f} MB, optimizer {b['optimizer'] / 1e6:,.1f} MB,"
        f" averages {b['averages'] / 1e6:,.1f} MB, statistics {b['statistics'] / 1e6:,.1f} MB,"
        f" checkpoint {b['checkpoint'] / 1e6:,.1f} MB",
        "",
        format_table(describe(config.optim, abstract_params(config))),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class PlanArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    topology: str = ""  # GPUs to compile the training step for, which need not be here: h100x1, h100x8, h200x2, a100x8, b200x8
    json: Json = ""
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        PlanArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.plan",
        description="Parameters, FLOPs and bytes of a recipe, how each tensor is optimized, what a step takes on given GPUs.",
    )
    config = arguments.overrides
    cli.check_json(arguments.json)
    cli.log_to_stderr(arguments.quiet)
    target = topology.parse(arguments.topology, config) if arguments.topology else None
    plan = make_plan(config)
    if arguments.json != "-":
        print(format_plan(config, plan), flush=True)
    if target:
        plan["topology"] = topology.describe(config, *target)
        if arguments.json != "-":
            print("", topology.format_topology(plan["topology"]), sep="\n")
    cli.write_json(plan, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
