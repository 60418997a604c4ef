"""The cost of a recipe: parameters, FLOPs and bytes, from shapes alone."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from sngpt_kernels.cayley import dictionary

from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config
from sngpt_jax.config.parameters import Parameter, parameter
from sngpt_jax.model.forward import Params, abstract_parts
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.optim.muon import newton_schulz_flops
from sngpt_jax.training.state import Shapes


def _sizes(params: Params) -> Iterator[tuple[str, Parameter, int]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        yield name, parameter(name), math.prod(leaf.shape)


def forward_flops_per_token(config: Config) -> int:
    """Floating-point operations of one token's forward pass; a multiply-add counts as two.

    Counted are matrix products with the head, once per application of a block, and causal
    attention, where a position sees (T + 1) / 2 keys on average, but no element-wise work.
    """
    m, T = config.model, config.data.seq_len
    uses = {str(layer): 1 + m.recycle_layers.count(layer) for layer in range(m.num_layers)}
    multiplied = sum(
        size * (uses[name.split("/")[1]] if name.startswith("blocks/") else 1)
        for name, row, size in _sizes(abstract_parts(m)[0])
        if row.multiplied
    )
    return 2 * multiplied + sum(uses.values()) * 2 * 2 * m.num_heads * m.head_dim * (T + 1) // 2


def code_flops_per_token(config: Config) -> int:
    """Additions and multiplications of the sparse codes in one token's forward pass, as
    `sngpt_kernels.cayley.xla` computes them: a transform for level 0, a product with a ±1 matrix
    per parent of a later level, and the sum of the active atoms.

    The model FLOPs, from which utilization is computed, leave them out.
    """
    m = config.model
    if not m.levels:
        return 0
    bits = m.d_model.bit_length() - 1
    terms = 2 ** (bits // 2) + 2 ** (bits - bits // 2) + sum(level.k for level in m.levels)
    for i, parent in enumerate(m.levels[:-1], 1):
        terms += parent.k * len(dictionary.children(m.levels, m.generators, i).steps)
    return m.num_layers * 2 * m.d_model * terms


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make_plan(shapes: Shapes) -> dict[str, Any]:
    """The figures that `plan` prints, as nested plain values.

    "parameters" counts by the groups of `config.parameters`. Its "backbone" leaves out learned
    positions and the codes' biases. A backward pass costs two forward passes.
    """
    config, state = shapes.config, shapes.state
    groups = Counter({"positions": 0, "sae_bias": 0})
    for _, row, size in _sizes(state.params):
        groups[str(row.counted)] += size
    total = sum(groups.values())
    forward = forward_flops_per_token(config)
    orthogonalizing = sum(
        row.count * newton_schulz_flops(row.shape, config.optim.newton_schulz_steps)
        for row in describe(config.optim, state.params)
        if row.rule == "muon"
    )
    kept = {
        "parameters": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "averages": _bytes((state.ema, state.swa)),
        "statistics": _bytes(state.statistics),
    }
    tokens, steps = config.data.batch_tokens, config.train.steps
    return {
        "parameters": {
            "total": total,
            "backbone": total - groups["positions"] - groups["sae_bias"],
            **groups,
        },
        "flops_per_token": {
            "forward": forward,
            "train": 3 * forward,
            "code": code_flops_per_token(config),
        },
        "flops_per_step": {"model": 3 * forward * tokens, "optimizer": orthogonalizing},
        "bytes": {**kept, "checkpoint": sum(kept.values())},
        "tokens": {"step": tokens, "run": tokens * steps},
    }


def format_plan(shapes: Shapes, plan: dict[str, Any]) -> str:
    """The plan as text, with the table of parameters."""
    config = shapes.config
    p, f, t = plan["parameters"], plan["flops_per_token"], plan["tokens"]
    groups = {name: p[name] for name in p if name not in ("total", "backbone") and p[name]}
    counted = ", ".join(f"{name} {count:,}" for name, count in groups.items())
    backbone = f"; backbone {p['backbone']:,}" if p["backbone"] != p["total"] else ""
    code = f"; the codes add {f['code'] / 1e6:,.1f} M forward" if f["code"] else ""
    step, run = plan["flops_per_step"], config.train.steps
    share = step["optimizer"] / (step["model"] + step["optimizer"])
    sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in plan["bytes"].items())
    return f"""\
parameters   {p["total"]:,} ({counted}){backbone}
FLOPs        {f["forward"] / 1e6:,.1f} M per token forward, {f["train"] / 1e6:,.1f} M in \
training{code}
step         {t["step"]:,} tokens, {step["model"] / 1e12:,.3f} TFLOP for the model and \
{step["optimizer"] / 1e12:,.3f} TFLOP to orthogonalize ({share:.2%} of the sum)
run          {run:,} steps, {t["run"] / 1e9:,.3f} G tokens, {step["model"] * run / 1e18:,.4f} EFLOP
memory       over all devices: {sizes}

{format_table(describe(config.optim, shapes.state.params))}"""
