"""A recipe's training step compiled for GPUs that need not be here: what it takes, what it does,
and what that allows.

The whole partitioned program goes through XLA's compiler for the device, its kernels and cuDNN
attention included; nothing runs. So memory, collectives and kernels are those of the program, but
for the algorithms of single kernels, which a device at hand would choose by timing them. Times are
limits, not predictions: no kernel is faster than its bytes and FLOPs allow.
"""

import dataclasses
import logging
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sngpt_kernels.dispatch import targeting

from sngpt_jax.ahead import hlo, targets
from sngpt_jax.ahead.targets import Target
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import BATCH_AXES, make_mesh
from sngpt_jax.config import Config, microbatches
from sngpt_jax.optim.schedules import step_controls
from sngpt_jax.training import compiler
from sngpt_jax.training.state import Shapes
from sngpt_jax.training.step import make_train_step

logger = logging.getLogger("sngpt_jax")

HEAVIEST = 10  # kernels that are listed
# of a GPU that jax takes for its arrays, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
MEMORY_SHARE = 0.75


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler made of a training step, on each of the devices."""

    device_batch_tokens: int  # of one device's microbatch
    accumulation: int  # microbatches of a step
    seconds: float  # that tracing and compiling took here
    arguments: int  # bytes of the state and the batch
    temporaries: int  # bytes beside them
    results: int  # bytes that are not written over the arguments
    program: hlo.Program

    @property
    def peak(self) -> int:
        """Bytes of memory that the step needs."""
        return self.arguments + self.temporaries + self.results


def parse(text: str, config: Config) -> tuple[Target, int]:
    """The device and how many of `--topology`; readies the process to compile for them, leaving a
    GPU that is here alone.

    Raises `UserError` where there is no such device, nothing here that compiles for it, or the
    batch does not divide over them.
    """
    try:
        target, count = targets.parse_topology(text)
        microbatches(
            config.data.batch_tokens, config.train.device_batch_tokens, config.data.seq_len, count
        )
        targets.prepare()
    except (ValueError, targets.MissingToolchain) as error:
        raise UserError(f"--topology: {error}") from None
    return target, count


def compile_step(config: Config, target: Target, count: int) -> CompiledStep:
    """Compiles the training step for `count` of the target. Raises `UserError` where the recipe
    cannot be dealt out to them.
    """
    data = config.data
    mesh = make_mesh(targets.devices(target, count), config.train.fsdp)
    accumulation = microbatches(
        data.batch_tokens, config.train.device_batch_tokens, data.seq_len, count
    )
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES))
    shape = (accumulation, data.batch_tokens // data.seq_len // accumulation, data.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, np.uint16, sharding=rows)
        for name in ("inputs", "targets")
    }
    controls = step_controls(config.optim, config.train, step=0, elapsed_seconds=0.0)
    controls = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype, sharding=everywhere), controls
    )
    start = time.perf_counter()
    with targeting(target.device):
        shapes = Shapes.of(config, mesh)
        traced = make_train_step(shapes).trace(shapes.state, batch, controls)
        compiled = compiler.compile_step(
            traced.lower(lowering_platforms=("cuda",)), targets.COMPILER_OPTIONS
        )
    memory = compiled.memory_analysis()
    return CompiledStep(
        device_batch_tokens=data.batch_tokens // accumulation // count,
        accumulation=accumulation,
        seconds=time.perf_counter() - start,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        program=hlo.analyse(compiled.as_text()),
    )


def largest_that_fits(
    config: Config, step: CompiledStep, target: Target, count: int
) -> CompiledStep | None:
    """The step with the largest microbatch that fits, `step` itself where it does; None where not
    even one sequence would.

    Temporaries grow about as the microbatch: that gives the next one to compile.
    """
    limit = int(MEMORY_SHARE * target.memory)
    while step.peak > limit:
        sequences = step.device_batch_tokens // config.data.seq_len
        room = limit - step.arguments - step.results
        wanted = min(sequences - 1, sequences * room // step.temporaries) * config.data.seq_len
        if wanted <= 0:
            return None
        tokens, used = step.device_batch_tokens, step.peak / 1e9
        logger.info(
            "%d tokens a device take %.1f GB of %.1f; trying at most %d",
            tokens,
            used,
            limit / 1e9,
            wanted,
        )
        train = dataclasses.replace(config.train, device_batch_tokens=wanted)
        step = compile_step(dataclasses.replace(config, train=train), target, count)
    return step


def collective_seconds(step: CompiledStep, target: Target, count: int) -> float:
    """The time of the collectives one after the other on links of full speed: rings move 2 (n - 1)
    / n of an all-reduce.
    """
    moved = 0.0
    for k in step.program.collectives:
        n = k.group or count
        # an all-gather's operand is one device's share of what moves
        hops = {"all-reduce": 2, "all-gather": n}
        moved += hops.get(k.opcode, 1) * k.times * k.bytes * (n - 1) / n
    return moved / target.link


_PARTS = re.compile(r"\b(attention|mlp|code|embed|head|statistics|optimizer|averages)\b")


def part_seconds(step: CompiledStep, target: Target) -> dict[str, float]:
    """The time at their rooflines of the kernels of each part of the step, largest first; "other":
    they name no part.
    """
    seconds: dict[str, float] = defaultdict(float)
    for kernel in step.program.kernels:
        part = _PARTS.search(kernel.scope)
        seconds[part[1] if part else "other"] += kernel.seconds(
            target.matmul_rate, target.bandwidth
        )
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def place_of(scope: str) -> str:
    """A kernel's scope without what all have in common: `backward block/mlp/dot_general`."""
    inner = re.sub(r"^jit\(\w+\)/|\b(gradient|shard_map|while|body|closed_call)/", "", scope)
    named = re.sub(r"\bjvp\((\w*)\)", r"\1", inner)
    return re.sub(r"^transpose\((\w*)\)", r"backward \1", named)


def heaviest(program: hlo.Program, target: Target) -> list[dict[str, Any]]:
    """The kernels that take longest at their rooflines; those that do the same in every layer
    count as one.
    """
    alike: dict[tuple[str, str], list[hlo.Kernel]] = defaultdict(list)
    for kernel in program.kernels:
        alike[
            re.sub(r"\.\d+$", "", kernel.name),
            re.sub(r"block_\d+", "block", place_of(kernel.scope)),
        ].append(kernel)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "place": place,
            "count": sum(k.times for k in kernels),
            "flops": sum(k.times * k.flops for k in kernels),
            "bytes": sum(k.times * k.bytes for k in kernels),
            "seconds": sum(k.seconds(target.matmul_rate, target.bandwidth) for k in kernels),
        }
        for (name, place), kernels in alike.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:HEAVIEST]


def optimizer_share(program: hlo.Program) -> dict[str, Any]:
    """What the update takes of the step's program: FLOPs and bytes of one device, and the
    collectives that it makes.

    A collective that the compiler has joined with one of the gradient counts here too.
    """
    update = [
        kernel
        for kernel in program.kernels
        if (part := _PARTS.search(kernel.scope)) and part[1] == "optimizer"
    ]
    own = hlo.Program(
        update, [c for c in program.collectives if re.search(r"\boptimizer\b", c.scope)]
    )
    counts = {
        kind: {"count": times, "bytes": moved}
        for kind, (times, moved) in sorted(own.collective_counts().items())
    }
    return {"flops": own.flops, "bytes": own.bytes, "collectives": counts}


def _collectives(counts: dict[str, Any]) -> str:
    return (
        ", ".join(
            f"{row['count']} {kind} of {row['bytes'] / 1e6:,.1f} MB in all"
            for kind, row in counts.items()
        )
        or "none"
    )


def describe(config: Config, target: Target, count: int) -> dict[str, Any]:
    """The figures of `--topology`, as nested plain values; bytes, FLOPs and kernels are those of
    one device and one step.
    """
    logger.info("compiling a training step for %d x %s", count, target.kind)
    step = compile_step(config, target, count)
    fitting = largest_that_fits(config, step, target, count)
    program = step.program
    kernels, collectives = (
        program.seconds(target.matmul_rate, target.bandwidth),
        collective_seconds(step, target, count),
    )
    return {
        "device": target.kind,
        "devices": count,
        "compile_seconds": round(step.seconds, 1),
        "device_batch_tokens": step.device_batch_tokens,
        "microbatches": step.accumulation,
        "memory": {
            "peak": step.peak,
            "arguments": step.arguments,
            "temporaries": step.temporaries,
            "limit": int(MEMORY_SHARE * target.memory),
            "device": target.memory,
        },
        "fits": fitting is step,
        "fitting_device_batch_tokens": fitting.device_batch_tokens if fitting else None,
        "flops": program.flops,
        "bytes": program.bytes,
        "optimizer": optimizer_share(program),
        "collectives": {
            kind: {"count": times, "bytes": moved}
            for kind, (times, moved) in sorted(program.collective_counts().items())
        },
        "kernels": dict(sorted(program.custom_kernels().items())),
        "heaviest": heaviest(program, target),
        "roofline": {
            "kernel_seconds": kernels,
            "collective_seconds": collectives,
            "step_seconds": kernels + collectives,
            "tokens_per_second": config.data.batch_tokens / (kernels + collectives),
            "part_seconds": part_seconds(step, target),
        },
    }


def format_topology(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    memory, roof, update = figures["memory"], figures["roofline"], figures["optimizer"]
    if figures["fits"]:
        verdict = "it fits"
    elif figures["fitting_device_batch_tokens"]:
        verdict = (
            f"it does NOT fit; --train.device-batch-tokens {figures['fitting_device_batch_tokens']}"
            " does"
        )
    else:
        verdict = (
            "it does NOT fit, not with one sequence a device either; spread the weights"
            " (--train.fsdp) or take more GPUs"
        )
    return "\n".join(
        [
            (
                f"on           {figures['devices']} x {figures['device']}, compiled in"
                f" {figures['compile_seconds']:.0f} s; {figures['microbatches']}"
                f" microbatch{'es' * (figures['microbatches'] > 1)}; figures of one device and one"
                " step"
            ),
            (
                f"memory       {memory['peak'] / 1e9:,.1f} GB ({memory['arguments'] / 1e9:,.1f}"
                f" state, {memory['temporaries'] / 1e9:,.1f} temporary) of the"
                f" {memory['limit'] / 1e9:,.1f} GB that jax takes: {verdict}"
            ),
            (
                f"work         {figures['flops'] / 1e12:,.2f} TFLOP on tensor cores,"
                f" {figures['bytes'] / 1e9:,.1f} GB moved"
            ),
            (
                f"optimizer    {update['flops'] / 1e12:,.3f} TFLOP"
                f" ({update['flops'] / figures['flops']:.1%}), {update['bytes'] / 1e9:,.2f} GB"
                f" moved ({update['bytes'] / figures['bytes']:.1%}), collectives:"
                f" {_collectives(update['collectives'])}"
            ),
            f"collectives  {_collectives(figures['collectives'])}",
            (
                "kernels     "
                f" {', '.join(f'{count} {name}' for name, count in figures['kernels'].items()) or 'none of our own'}"
            ),
            (
                f"limit        {roof['step_seconds'] * 1e3:,.1f} ms a step,"
                f" {roof['tokens_per_second'] / 1e3:,.0f} thousand tokens a second: kernels at"
                f" their rooflines {roof['kernel_seconds'] * 1e3:,.1f} ms, then collectives"
                f" {roof['collective_seconds'] * 1e3:,.1f} ms"
            ),
            "of that      "
            + ", ".join(
                f"{part} {s / roof['step_seconds']:.1%}" for part, s in roof["part_seconds"].items()
            ),
            "heaviest",
            *(
                f"{r['seconds'] * 1e3:10.2f} ms {r['bytes'] / 1e9:8.2f} GB {r['count']:5} x"
                f" {r['name']} of {r['place']}"
                for r in figures["heaviest"]
            ),
        ]
    )
