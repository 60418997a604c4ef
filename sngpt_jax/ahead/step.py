"""A recipe's training step, compiled for GPUs that this machine need not have.

XLA compiles the whole partitioned program, so memory, collectives and kernels are those of the real
program. Only the algorithms of single kernels can differ, because a device would choose them by
timing. Times are limits and no predictions: no kernel is faster than its bytes and FLOPs allow.
"""

import logging
import re
import time
from collections import defaultdict
from dataclasses import dataclass, replace
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
from sngpt_jax.training.fitting import Need, fewer
from sngpt_jax.training.state import Shapes
from sngpt_jax.training.step import make_train_step

logger = logging.getLogger("sngpt_jax")

HEAVIEST = 10  # kernels in the list
# jax takes this share of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another
MEMORY_SHARE = 0.75


@dataclass(frozen=True)
class CompiledStep:
    """A compiled training step. Its figures are those of one device."""

    device_batch_tokens: int  # per microbatch
    accumulation: int  # microbatches per step
    seconds: float  # of tracing and compiling on this machine
    arguments: int  # bytes of the state and the batch
    temporaries: int  # bytes beside them
    results: int  # bytes that are not written over the arguments
    program: hlo.Program

    @property
    def peak(self) -> int:
        """Bytes of memory that the step needs."""
        return self.arguments + self.temporaries + self.results


def parse(text: str, config: Config) -> tuple[Target, int]:
    """The device and number of `--topology`. It also prepares the process to compile for them.

    Raises `UserError` for an unknown device, if no compiler is installed, or if the batch does not
    divide over the devices.
    """
    try:
        target, count = targets.parse_topology(text)
        accumulation_of(config, count)
        targets.prepare()
    except (ValueError, targets.MissingToolchain) as error:
        raise UserError(f"--topology: {error}") from None
    return target, count


def accumulation_of(config: Config, count: int) -> int:
    """The microbatches of a step on `count` devices."""
    data = config.data
    return microbatches(data.batch_tokens, config.train.device_batch_tokens, data.seq_len, count)


def compile_step(config: Config, target: Target, count: int) -> CompiledStep:
    """Compiles the training step for `count` targets."""
    data, accumulation = config.data, accumulation_of(config, count)
    mesh = make_mesh(targets.devices(target, count), config.train.fsdp)
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES))
    shape = (accumulation, data.batch_tokens // data.seq_len // accumulation, data.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, np.uint16, sharding=rows)
    batch = {"inputs": tokens, "targets": tokens}
    controls = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype, sharding=everywhere),
        step_controls(config.optim, config.train, step=0, elapsed_seconds=0.0),
    )
    start = time.perf_counter()
    # tokamax asks jax's default device for its kind
    with targeting(target.device), jax.default_device(mesh.devices.flat[0]):
        shapes = Shapes.of(config, mesh)
        traced = make_train_step(shapes).trace(shapes.state, batch, controls)
        lowered = traced.lower(lowering_platforms=("cuda",))
        compiled = compiler.compile_step(lowered, targets.COMPILER_OPTIONS)
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
    """The step with the largest microbatch that fits, or `step` if it fits already.

    It is None if not even one sequence fits.
    """
    limit = int(MEMORY_SHARE * target.memory)
    while step.peak > limit:
        sequences = step.device_batch_tokens // config.data.seq_len
        need = Need(step.arguments + step.results, step.temporaries)
        wanted = fewer(need, limit, sequences) * config.data.seq_len
        if not wanted:
            return None
        logger.info(
            f"{step.device_batch_tokens} tokens per device take {step.peak / 1e9:.1f} GB of"
            f" {limit / 1e9:.1f}; trying at most {wanted}"
        )
        train = replace(config.train, device_batch_tokens=wanted)
        step = compile_step(replace(config, train=train), target, count)
    return step


def collective_seconds(step: CompiledStep, target: Target, count: int) -> float:
    """The time of the collectives one after the other on links of full speed.

    A ring moves 2 (n - 1) / n of the bytes of an all-reduce.
    """
    moved = 0.0
    for k in step.program.collectives:
        n = k.group or count
        # The operand of an all-gather is one device's share of the bytes.
        hops = {"all-reduce": 2, "all-gather": n}
        moved += hops.get(k.opcode, 1) * k.times * k.bytes * (n - 1) / n
    return moved / target.link


_PARTS = re.compile(r"\b(attention|mlp|code|embed|head|statistics|optimizer|averages)\b")


def part_of(kernel: hlo.Kernel) -> str:
    """The part of the step that names the kernel, or "other"."""
    part = _PARTS.search(kernel.scope)
    return part[1] if part else "other"


def part_seconds(step: CompiledStep, target: Target) -> dict[str, float]:
    """The least time of the kernels of each part of the step, the largest first."""
    seconds: dict[str, float] = defaultdict(float)
    for kernel in step.program.kernels:
        seconds[part_of(kernel)] += kernel.seconds(target.matmul_rate, target.bandwidth)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def part_launches(program: hlo.Program) -> dict[str, int]:
    """The kernels that each part of the step launches, the most first."""
    launches: dict[str, int] = defaultdict(int)
    for kernel in program.kernels:
        launches[part_of(kernel)] += kernel.times
    return dict(sorted(launches.items(), key=lambda item: -item[1]))


def place_of(scope: str) -> str:
    """A kernel's scope without the common parts: `backward block/mlp/dot_general`."""
    inner = re.sub(r"^jit\(\w+\)/|\b(gradient|shard_map|while|body|closed_call)/", "", scope)
    named = re.sub(r"\bjvp\((\w*)\)", r"\1", inner)
    return re.sub(r"^transpose\((\w*)\)", r"backward \1", named)


def heaviest(program: hlo.Program, target: Target) -> list[dict[str, Any]]:
    """The kernels with the longest least times. Equal kernels of all layers count as one."""
    alike: dict[tuple[str, str], list[hlo.Kernel]] = defaultdict(list)
    for kernel in program.kernels:
        place = re.sub(r"block_\d+", "block", place_of(kernel.scope))
        alike[re.sub(r"\.\d+$", "", kernel.name), place].append(kernel)
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
    """The update's part of the program: FLOPs and bytes of one device, and its collectives.

    It includes a collective that the compiler joined with one of the gradient.
    """
    own = hlo.Program(
        [kernel for kernel in program.kernels if part_of(kernel) == "optimizer"],
        [c for c in program.collectives if re.search(r"\boptimizer\b", c.scope)],
    )
    return {"flops": own.flops, "bytes": own.bytes, "collectives": count_collectives(own)}


def count_collectives(program: hlo.Program) -> dict[str, dict[str, int]]:
    """The number of calls and the bytes of each kind of collective."""
    counts = sorted(program.collective_counts().items())
    return {kind: {"count": times, "bytes": moved} for kind, (times, moved) in counts}


def _format_collectives(counts: dict[str, Any]) -> str:
    said = [f"{row['count']} {kind}, {row['bytes'] / 1e6:,.1f} MB" for kind, row in counts.items()]
    return "; ".join(said) or "none"


def describe(config: Config, target: Target, count: int) -> dict[str, Any]:
    """The figures of `--topology` as nested plain values, per device and step."""
    logger.info(f"compiling a training step for {count} x {target.kind}")
    step = compile_step(config, target, count)
    fitting = largest_that_fits(config, step, target, count)
    if fitting and not config.train.device_batch_tokens:  # automatic
        step = fitting
    program = step.program
    kernels = program.seconds(target.matmul_rate, target.bandwidth)
    collectives = collective_seconds(step, target, count)
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
        "collectives": count_collectives(program),
        "kernels": dict(sorted(program.custom_kernels().items())),
        "launches": part_launches(program),
        "heaviest": heaviest(program, target),
        "narrow_sums": dict(program.narrow_sums),
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
    fitting = figures["fitting_device_batch_tokens"]
    verdict = "it fits"
    if not figures["fits"]:
        verdict = f"it does NOT fit; --train.device-batch-tokens {fitting} does"
    if not fitting:
        verdict = "it does NOT fit even with one sequence per device; set --train.fsdp or add GPUs"
    kernels = ", ".join(f"{count} {name}" for name, count in figures["kernels"].items())
    launches = figures["launches"]
    flops = f"{update['flops'] / 1e12:,.3f} TFLOP ({update['flops'] / figures['flops']:.1%})"
    moved = f"{update['bytes'] / 1e9:,.2f} GB moved ({update['bytes'] / figures['bytes']:.1%})"
    parts = roof["part_seconds"].items()
    rows = {
        "on": f"{figures['devices']} x {figures['device']}, compiled in"
        f" {figures['compile_seconds']:.0f} s; figures are per device and step",
        "microbatches": f"{figures['microbatches']}",
        "memory": f"{memory['peak'] / 1e9:,.1f} GB ({memory['arguments'] / 1e9:,.1f} state,"
        f" {memory['temporaries'] / 1e9:,.1f} temporary) of the"
        f" {memory['limit'] / 1e9:,.1f} GB that jax takes: {verdict}",
        "work": f"{figures['flops'] / 1e12:,.2f} TFLOP on tensor cores,"
        f" {figures['bytes'] / 1e9:,.1f} GB moved",
        "optimizer": f"{flops}, {moved}, collectives: {_format_collectives(update['collectives'])}",
        "collectives": _format_collectives(figures["collectives"]),
        "kernels": kernels or "none of our own",
        "launches": f"{sum(launches.values()):,} kernels: "
        + ", ".join(f"{part} {count:,}" for part, count in launches.items()),
        "limit": f"{roof['step_seconds'] * 1e3:,.1f} ms per step,"
        f" {roof['tokens_per_second'] / 1e3:,.0f} thousand tokens per second: kernels at their"
        f" rooflines {roof['kernel_seconds'] * 1e3:,.1f} ms, then collectives"
        f" {roof['collective_seconds'] * 1e3:,.1f} ms",
        "parts": ", ".join(f"{part} {s / roof['step_seconds']:.1%}" for part, s in parts),
    }
    heavy = [
        f"{r['seconds'] * 1e3:10.2f} ms {r['bytes'] / 1e9:8.2f} GB {r['count']:5} x {r['name']}"
        f" of {r['place']}"
        for r in figures["heaviest"]
    ]
    return "\n".join([*(f"{name:12} {text}" for name, text in rows.items()), "heaviest", *heavy])
