"""The story of a run.

    recipe → data → state (new, or the last checkpoint) → compile → steps, validation, checkpoints → summary

`loop.py` holds the loop itself. Training time, which a wall-clock schedule follows, leaves out
compilation, validation and checkpoints.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sngpt_jax import __version__
from sngpt_jax.base import cli
from sngpt_jax.base.errors import EXIT_NON_FINITE, UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.config import Config, microbatches, profile_window
from sngpt_jax.data.loader import batches_of, make_loader
from sngpt_jax.data.prepared import prepared_data
from sngpt_jax.data.shards import Dataset
from sngpt_jax.model.generation import generate
from sngpt_jax.optim import qat
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.optim.schedules import StepControls
from sngpt_jax.run import checkpoint, environment
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run.checkpoint import forgive_late_callbacks
from sngpt_jax.run.console import Console
from sngpt_jax.run.directory import Summary
from sngpt_jax.run.meter import StepMeter, peak_flops
from sngpt_jax.run.metrics import MetricsWriter
from sngpt_jax.run.profiler import Profiler
from sngpt_jax.run.signals import EXIT_STATUS, StopSignals
from sngpt_jax.training import compiler
from sngpt_jax.training.compiler import keep_working_memory, use_compilation_cache
from sngpt_jax.training.cost import abstract_params, make_plan
from sngpt_jax.training.loop import NonFinite, Position, Run, Stopped
from sngpt_jax.training.state import abstract_state, init_state
from sngpt_jax.training.step import make_train_step


def train(config: Config, directory: Path, console: Console) -> int:
    """Trains into `directory` from where it stands until the recipe's end (0) or a signal (130,
    143); the exit status.

    Raises `NonFinite` where the run has diverged, `UserError` where the machine or the directory
    does not fit the recipe.
    """
    # 1. Devices: how the sequences of a step are dealt out.
    d, t = config.data, config.train
    keep_working_memory()
    forgive_late_callbacks()
    mesh = make_mesh(fsdp=t.fsdp)
    accumulation = microbatches(d.batch_tokens, t.device_batch_tokens, d.seq_len, mesh.devices.size)
    use_compilation_cache(t.compilation_cache)

    # 2. Data.
    with processes.first():
        data = prepared_data(config)
    if config.model.smear_mask_bos and data.tokenizer.bos_id != config.model.bos_id:
        raise UserError(
            f"model.bos_id = {config.model.bos_id}, but the tokenizer's is {data.tokenizer.bos_id};"
            " set it to that"
        )
    batches = batches_of(config, data.train)
    place = batch_placer(mesh, accumulation)
    processes.check_alike(
        {
            "version": f"{__version__}, jax {jax.__version__}",
            **{
                f"{section}.{name}": value
                for section, fields in asdict(config).items()
                for name, value in fields.items()
            },
            "training tokens": len(data.train),
            "validation tokens": len(data.val),
            "tokenizer": data.tokenizer.sha256,
        }
    )

    # 3. What was asked for, what it will cost, and how each tensor is optimized, before anything
    # is computed.
    if config.optim.qat_below:
        qat.check(abstract_params(config), config)
    plan = make_plan(config)
    peak = peak_flops(jax.devices()[0].device_kind)
    console.header("configuration", settings(config))
    console.header(
        f"sngpt_jax {__version__}", derived(config, directory, data, plan, accumulation, mesh)
    )
    for line in format_table(describe(config.optim, abstract_params(config))).splitlines():
        console.print(line)
    controls = StepControls(np.float32(0), np.float32(0), np.bool_(False), np.bool_(False))

    # 4. The program, before there is a run: what the compiler refuses leaves nothing behind.
    console.print("compiling the training step …")
    start = time.perf_counter()
    lowered = make_train_step(config, mesh).lower(
        abstract_state(config, mesh), place(batches[0]), controls
    )
    train_step = compiler.compile_step(lowered)
    console.print(f"compiled in {time.perf_counter() - start:.1f} s")

    # 5. State: the last checkpoint that verifies, or a new one.
    folder = run_directory.checkpoint_dir(directory)
    with (
        checkpoint.Checkpointer(folder, keep=t.keep_checkpoints) as checkpoints,
        StopSignals() as signals,
    ):
        restored = checkpoint.restore(folder, abstract_state(config, mesh))
        state = restored.state if restored else init_state(config, mesh)
        done = restored.step if restored else 0
        position = (
            Position.from_json(restored.extra, f"{folder}, step {done}") if restored else Position()
        )
        with processes.first():
            run_directory.begin(directory, config, data.tokenizer)
            environment.record(directory, done)
            run_directory.keep_data(directory, data)
        if restored:
            console.print(f"resuming after step {done:,}")

        # 6. The loop.
        processes.barrier()
        # what a program does at its first call alone is no part of the time that drives the
        # schedule
        if t.max_seconds:
            jax.block_until_ready(
                train_step(jax.tree.map(jnp.copy, state), place(batches[done]), controls)
            )
        with (
            make_loader(batches, place, num_steps=t.steps, state=position.data) as loader,
            MetricsWriter(directory, resume_step=done if restored else None) as writer,
        ):
            run = Run(
                config=config,
                console=console,
                mesh=mesh,
                data=data,
                state=state,
                done=done,
                position=position,
                train_step=train_step,
                loader=loader,
                writer=writer,
                checkpoints=checkpoints,
                meter=StepMeter(
                    d.batch_tokens,
                    plan["flops_per_token"]["train"],
                    peak and peak * mesh.devices.size,
                ),
                profiler=Profiler(
                    directory / "profile", profile_window(t) if processes.index() == 0 else None
                ),
                signals=signals,
            )
            try:
                run.loop()
                summary = run.finish(directory)
            except Stopped as stopped:
                run.aside(validating=False, saving=True)
                checkpoints.wait()
                return EXIT_STATUS[stopped.signal]
            finally:
                run.profiler.stop()

        # 7. The result.
        if processes.index() == 0:
            run_directory.write_summary(directory, summary)
        print_summary(console, directory, summary)
        if config.eval.sample_tokens and not console.quiet:
            weights = run.weights()
            if config.eval.weights not in weights:
                console.print(
                    f"eval.weights = {config.eval.weights}: no snapshot was taken; the sample is of"
                    " the final weights"
                )
            text = generate(
                config.model,
                weights.get(config.eval.weights, weights["final"]),
                mesh,
                data.tokenizer,
                config.eval.sample_prompt,
                seq_len=config.data.seq_len,
                max_tokens=config.eval.sample_tokens,
                temperature=0.8,
            )
            console.print("sample:")
            for line in cli.escape_controls(text).splitlines():
                console.print(line)
        return 0


def settings(config: Config) -> list[tuple[str, str]]:
    """Every field with its value, a section a row."""
    return [
        (name, ", ".join(f"{k} {v!r}" for k, v in section.items()))
        for name, section in asdict(config).items()
    ]


def derived(
    config: Config,
    directory: Path,
    data: Dataset,
    plan: dict[str, Any],
    accumulation: int,
    mesh: Mesh,
) -> list[tuple[str, str]]:
    """What the configuration comes to on this machine, for the head of the log."""
    device_kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(device_kind)
    peak_text = f", {peak / 1e12:,.0f} T a second at most on each device" if peak else ""
    cap = f", at most {config.train.max_seconds:g} s" if config.train.max_seconds else ""
    batch = (
        f"{config.data.batch_tokens:,} tokens in {accumulation}"
        f" microbatch{'es' * (accumulation > 1)}"
    )
    return [
        ("run", str(directory)),
        (
            "devices",
            f"{mesh.devices.size} x {device_kind}"
            + (f" of {n} processes" if (n := processes.count()) > 1 else ""),
        ),
        ("data", f"{len(data.train):,} training tokens, {len(data.val):,} for validation"),
        ("parameters", f"{plan['parameters']['total']:,}"),
        ("step", batch),
        ("training", f"{config.train.steps:,} steps, {plan['tokens']['run']:,} tokens{cap}"),
        ("FLOPs", f"{plan['flops_per_token']['train'] / 1e6:,.1f} M a token{peak_text}"),
    ]


def print_summary(console: Console, directory: Path, summary: Summary) -> None:
    """The result of a finished run, and what can be done with it."""
    untrained = summary.untrained_val_bpb
    ratio = (
        f" = {summary.val_bpb / untrained:.3f} x the untrained model's {untrained:.4f}"
        if untrained
        else ""
    )
    run = str(directory)
    console.result(
        "finished",
        [
            ("run", run),
            (
                "training",
                (
                    f"{summary.steps:,} steps, {summary.tokens:,} tokens in"
                    f" {summary.train_seconds:,.1f} s"
                ),
            ),
            ("speed", f"{summary.tok_per_s:,.0f} tok/s"),
            (
                "validation",
                f"loss {summary.val_loss:.4f} nats/token, {summary.val_bpb:.4f} bits/byte{ratio}",
            ),
            *(
                (f"{name} weights", f"{bpb:.4f} bits/byte")
                for name, bpb in (("SWA", summary.swa_val_bpb), ("EMA", summary.ema_val_bpb))
                if bpb is not None
            ),
            ("checkpoint", summary.checkpoint),
        ],
        [
            cli.command("sngpt_jax.evaluate", "--run", run),
            cli.command("sngpt_jax.sample", "--run", run),
            cli.command("sngpt_jax.export", "--run", run, "--out", f"{run}/model.sngpt"),
            cli.command("sngpt_jax.report", run, "--out", f"{run}/report.html"),
        ],
    )


def run(
    config: Config, directory: Path, members: ProcessArguments, *, quiet: bool, again: str
) -> int:
    """Trains `config` in `directory`, alone or as one of several processes; returns the command's
    exit status.

    `again` is the command line that resumes the run.
    """
    with (
        processes.joined(members),
        Console(config.train.steps, config.train.max_seconds, quiet=quiet) as console,
        run_directory.claim(directory, config),
    ):
        summary = run_directory.read_summary(directory)
        if processes.broadcast(lambda: summary is not None):
            if summary:
                print_summary(console, directory, summary)
            return 0
        try:
            status = train(config, directory, console)
        except NonFinite as error:
            folder = run_directory.checkpoint_dir(directory)
            saved = [step for step in checkpoint.steps(folder) if step <= error.good]
            good = (
                f"the last good checkpoint is {checkpoint.step_folder(folder, saved[-1])}"
                if saved
                else "no good checkpoint"
            )
            if processes.index() == 0:
                print(
                    f"error: {error}; {good}; try lower learning rates in another --run-dir",
                    file=sys.stderr,
                )
            return EXIT_NON_FINITE
        if status and processes.index() == 0:
            print(f"stopped and saved; to go on: {again}", file=sys.stderr)
    return status
