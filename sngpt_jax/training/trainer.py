"""The story of a run: recipe → data → program → state (new or restored) → loop → summary.

`loop.py` holds the loop of steps, validation and checkpoints.
"""

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sngpt_jax import __version__
from sngpt_jax.base import cli
from sngpt_jax.base.errors import EXIT_NON_FINITE, UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.config import Config, flat, profile_window
from sngpt_jax.data.identity import DataName
from sngpt_jax.data.loader import batches_of, make_loader
from sngpt_jax.data.prepared import prepared_data
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.model.generation import generate
from sngpt_jax.optim import qat
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.optim.schedules import step_controls
from sngpt_jax.run import checkpoint, environment
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run.console import Console
from sngpt_jax.run.directory import Summary
from sngpt_jax.run.meter import StepMeter, peak_flops
from sngpt_jax.run.metrics import MetricsWriter
from sngpt_jax.run.profiler import Profiler
from sngpt_jax.run.signals import EXIT_STATUS, StopSignals
from sngpt_jax.training import compiler, fitting, trust
from sngpt_jax.training.cost import make_plan
from sngpt_jax.training.loop import NonFinite, Position, Run, Stopped
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.training.step import make_train_step


def train(config: Config, directory: Path, console: Console, kernels: trust.Mode = "check") -> int:
    """Trains into `directory`, from its last checkpoint if it has one. Returns the exit status.
    `kernels` says which custom kernels may run.

    Raises `NonFinite` if the run diverges, and `UserError` if the machine or the directory does not
    fit the recipe.
    """
    # 1. Devices, and how they share the sequences of a step.
    d, t = config.data, config.train
    compiler.keep_working_memory()
    checkpoint.forgive_late_callbacks()
    mesh = make_mesh(fsdp=t.fsdp)
    compiler.use_compilation_cache(t.compilation_cache)
    shapes = Shapes.of(config, mesh)
    fitting.accumulation_of(shapes)  # raises before the data are prepared

    # 2. Data.
    with processes.first():
        data = prepared_data(config)
    if config.model.smear_mask_bos and data.tokenizer.bos_id != config.model.bos_id:
        raise UserError(
            f"model.bos_id = {config.model.bos_id}, but the tokenizer's is {data.tokenizer.bos_id};"
            " set model.bos_id to the tokenizer's"
        )
    batches = batches_of(config, data.train)
    processes.check_alike(
        {
            "version": f"{__version__}, jax {jax.__version__}",
            **flat(config),
            "--kernels": kernels,
            "training tokens": len(data.train),
            "validation tokens": len(data.val),
            "tokenizer": data.tokenizer.sha256,
        }
    )

    # 3. The configuration, its cost, and each tensor's optimizer, before anything is computed.
    shapes = fitting.resolved(shapes, kernels)
    config, accumulation = shapes.config, fitting.accumulation_of(shapes)
    place = batch_placer(mesh, accumulation)
    if config.optim.qat_below:
        qat.check(shapes.state.params, config)
    plan, settings = make_plan(shapes), list[tuple[str, str]]()
    for section, fields in vars(config).items():
        settings.append((section, ", ".join(f"{name} {x!r}" for name, x in vars(fields).items())))
    console.header("configuration", settings)
    console.header(f"sngpt_jax {__version__}", derived(shapes, directory, data, plan, accumulation))
    console.print(format_table(describe(config.optim, shapes.state.params)))

    # 4. The program. It comes before the run, so that a compiler error leaves nothing behind.
    verdicts = trust.settle(config, d.batch_tokens // accumulation // mesh.devices.size, kernels)
    console.print("compiling the training step …")
    start = time.perf_counter()
    controls = step_controls(config.optim, t, 0, 0.0)
    lowered = make_train_step(shapes).lower(shapes.state, place(batches[0]), controls)
    train_step = compiler.compile_step(lowered)
    fitting.check(shapes, train_step)
    validation = Fitted(make_eval_step(config.model, mesh), mesh, "validation")
    fitting.check_validation(shapes, train_step, validation, data.val)
    console.print(f"compiled in {time.perf_counter() - start:.1f} s")

    # 5. State: the last checkpoint that verifies, or a new one.
    folder = run_directory.checkpoint_dir(directory)
    with (
        checkpoint.Checkpointer(folder, keep=t.keep_checkpoints) as checkpoints,
        StopSignals() as signals,
    ):
        if restored := checkpoint.restore(folder, shapes.state):
            state, done = restored.state, restored.step
            position = Position.from_json(restored.extra, f"{folder}, step {done}")
        elif run_directory.imported_path(directory).exists():
            raise UserError(
                f"{directory}: the import of its weights did not finish; run the same"
                " sngpt_jax.interop import again, or choose another --run-dir"
            )
        else:
            state, done, position = init_state(shapes), 0, Position()
        with processes.first():
            run_directory.begin(directory, config, data.tokenizer)
            trust.report_changes(environment.last(directory).get("kernels"), verdicts)
            environment.record(directory, done, verdicts)
            run_directory.keep_data(directory, data)
        if restored:
            console.print(f"resuming after step {done:,}")

        # 6. The loop.
        processes.barrier()
        if t.max_seconds:  # a program's first call takes longer; the schedule must not see it
            copied = jax.tree.map(jnp.copy, state)
            jax.block_until_ready(train_step(copied, place(batches[done]), controls))
        peak = peak_flops(jax.devices()[0].device_kind)
        meter = StepMeter(
            d.batch_tokens, plan["flops_per_token"]["train"], peak and peak * mesh.devices.size
        )
        window = profile_window(t) if processes.index() == 0 else None
        with (
            closing(make_loader(batches, place, num_steps=t.steps, state=position.data)) as loader,
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
                eval_step=validation,
                loader=loader,
                writer=writer,
                checkpoints=checkpoints,
                meter=meter,
                profiler=Profiler(directory / "profile", window),
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
            print_sample(run)
        return 0


def derived(
    shapes: Shapes, directory: Path, data: Dataset, plan: dict[str, Any], accumulation: int
) -> list[tuple[str, str]]:
    """The rows of what follows from the configuration on this machine."""
    config, devices = shapes.config, shapes.mesh.devices
    kind = devices.flat[0].device_kind
    peak = peak_flops(kind)
    limit = f", at most {peak / 1e12:,.0f} TFLOP/s per device" if peak else ""
    cap = f", at most {config.train.max_seconds:g} s" if config.train.max_seconds else ""
    members = f" in {n} processes" if (n := processes.count()) > 1 else ""
    plural = "es" * (accumulation > 1)
    return [
        ("run", str(directory)),
        ("devices", f"{devices.size} x {kind}{members}"),
        ("data", f"{len(data.train):,} training tokens, {len(data.val):,} for validation"),
        ("parameters", f"{plan['parameters']['total']:,}"),
        ("step", f"{config.data.batch_tokens:,} tokens in {accumulation} microbatch{plural}"),
        ("training", f"{config.train.steps:,} steps, {plan['tokens']['run']:,} tokens{cap}"),
        ("FLOPs", f"{plan['flops_per_token']['train'] / 1e6:,.1f} M per token{limit}"),
    ]


def print_summary(console: Console, directory: Path, summary: Summary) -> None:
    """Prints the result of a finished run and the commands that can follow."""
    s, run, ratio = summary, str(directory), ""
    unit = f"bits/byte ({s.val_byte_count})"
    if untrained := s.untrained_val_bpb:
        ratio = f" = {s.val_bpb / untrained:.3f} x the untrained model's {untrained:.4f}"
    scored_on = f" of {DataName(s.val_data, s.val_hash)}" if s.val_data and s.val_hash else ""
    averages = [("SWA weights", s.swa_val_bpb), ("EMA weights", s.ema_val_bpb)]
    console.result(
        "finished",
        [
            ("run", run),
            ("training", f"{s.steps:,} steps, {s.tokens:,} tokens in {s.train_seconds:,.1f} s"),
            ("speed", f"{s.tok_per_s:,.0f} tok/s"),
            ("validation", f"loss {s.val_loss:.4f} nats/token, {s.val_bpb:.4f} {unit}{ratio}"),
            ("scored", f"{s.val_tokens:,} validation tokens" + scored_on),
            *((name, f"{bpb:.4f} {unit}") for name, bpb in averages if bpb is not None),
            ("checkpoint", s.checkpoint),
        ],
        [
            cli.command("sngpt_jax.evaluate", "--run", run),
            cli.command("sngpt_jax.sample", "--run", run),
            cli.command("sngpt_jax.export", "--run", run, "--out", f"{run}/model.sngpt"),
            cli.command("sngpt_jax.report", run, "--out", f"{run}/report.html"),
        ],
    )


def print_sample(run: Run) -> None:
    """Prints a text that the trained model continues from the recipe's prompt."""
    e, weights = run.config.eval, run.weights()
    if e.weights not in weights:
        run.console.print(
            f"eval.weights = {e.weights} has no snapshot; final weights give the sample"
        )
    text = generate(
        run.config.model,
        weights.get(e.weights, weights["final"]),
        run.mesh,
        run.data.tokenizer,
        e.sample_prompt,
        seq_len=run.config.data.seq_len,
        max_tokens=e.sample_tokens,
        temperature=0.8,
    )
    run.console.print(f"sample:\n{cli.escape_controls(text)}")


def run(
    config: Config,
    directory: Path,
    members: ProcessArguments,
    *,
    quiet: bool,
    again: str,
    kernels: trust.Mode = "check",
) -> int:
    """Trains `config` in `directory`, alone or as one of several processes; returns the command's
    exit status. `again` is the command line that resumes the run.
    """
    with (
        processes.joined(members),
        Console(config.train.steps, config.train.max_seconds, quiet=quiet) as console,
        run_directory.claim(directory, config) as config,
    ):
        summary = run_directory.read_summary(directory)
        if processes.broadcast(lambda: summary is not None):
            if summary:
                print_summary(console, directory, summary)
            return 0
        try:
            status = train(config, directory, console, kernels)
        except NonFinite as error:
            folder = run_directory.checkpoint_dir(directory)
            saved = [step for step in checkpoint.steps(folder) if step <= error.good]
            good = "no good checkpoint"
            if saved:
                good = f"the last good checkpoint is {checkpoint.step_folder(folder, saved[-1])}"
            advice = "try lower learning rates in another --run-dir"
            if processes.index() == 0:
                print(f"error: {error}; {good}; {advice}", file=sys.stderr)
            return EXIT_NON_FINITE
        if status and processes.index() == 0:
            print(f"stopped and saved; to go on: {again}", file=sys.stderr)
    return status
