"""The story of a run: `python -m sngpt_jax.train --config configs/quickstart.py`.

    recipe → data → state (new, or the last checkpoint) → compile → steps, validation, checkpoints → summary

The loop sends step N to the device and then reads the metrics of step N-1, so the device does not wait for the host.
Training time, which a wall-clock schedule follows, leaves out compilation, validation and checkpoints.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax import __version__, checkpoint, cli, run_directory
from sngpt_jax.cli import EXIT_NON_FINITE, write_text_atomic
from sngpt_jax.config import Config, Overrides, microbatches, parse_command, profile_window, recipe_name
from sngpt_jax.console import Console
from sngpt_jax.data.loader import GlobalBatches, Loader, make_loader
from sngpt_jax.data.recipe import prepared_data
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import Score, score_stream
from sngpt_jax.metrics import MetricsWriter, StepMeter, peak_flops
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.optim.schedules import lr_multiplier
from sngpt_jax.parallel import batch_placer, make_mesh, use_compilation_cache
from sngpt_jax.plan import abstract_params, make_plan
from sngpt_jax.runtime import ProfileWindow, StopSignals, Stopwatch
from sngpt_jax.sample import generate
from sngpt_jax.step import (
    Batch,
    Metrics,
    TrainState,
    abstract_state,
    all_finite,
    init_state,
    make_eval_step,
    make_train_step,
)


class NonFinite(Exception):
    """The run has diverged: a loss or a parameter is no longer a finite number."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, beside its arrays; kept in every checkpoint."""

    elapsed_seconds: float = 0.0  # of training
    best_val_loss: float | None = None
    first_val_bpb: float | None = None  # of the untrained model
    data: dict[str, Any] = field(default_factory=dict)  # the loader's position


@dataclass
class Run:
    """The loop, with what it works on."""

    config: Config
    directory: Path
    console: Console
    mesh: Mesh
    data: Dataset
    state: TrainState
    done: int  # steps sent so far
    position: Position
    train_step: Callable[[TrainState, Batch, np.float32], tuple[TrainState, Metrics]]
    loader: Loader[Batch]
    writer: MetricsWriter
    checkpoints: checkpoint.Checkpointer
    meter: StepMeter
    stopwatch: Stopwatch
    profile: ProfileWindow
    sent: tuple[int, float, Metrics] | None = None  # the step on the device whose metrics have not been read

    def __post_init__(self) -> None:
        self.eval_step = make_eval_step(self.config.model, self.mesh)
        self.token_bytes = self.data.tokenizer.token_bytes()

    def loop(self, signals: StopSignals) -> None:
        """Steps until the recipe's last one, its wall-clock cap, or a signal; every step sent has been read at the end."""
        train, every = self.config.train, self.config.eval.every
        if self.done == 0 and every:
            self.aside(validation=True, saving=False)
        self.meter.start(self.done)
        while self.done < train.steps and not signals.received:
            if train.max_seconds and self.stopwatch.seconds >= train.max_seconds:
                break
            self.step()
            validation_due = bool(every) and self.done % every == 0
            checkpoint_due = bool(train.checkpoint_every) and self.done % train.checkpoint_every == 0
            if (validation_due or checkpoint_due) and self.done < train.steps:
                self.read()
                self.aside(validation_due, checkpoint_due)
                self.meter.start(self.done)
        self.read()
        self.profile.close()

    def aside(self, validation: bool, saving: bool) -> Score | None:
        """Validates, saves, or both, off the clock; the last step must have been read."""
        with self.stopwatch.paused():
            score = self.validate() if validation else None
            if saving:
                self.save(score)
        return score

    def step(self) -> None:
        """Sends one step to the device, then reads the one before it."""
        config = self.config
        multiplier = lr_multiplier(config.optim, config.train, self.done, self.stopwatch.seconds)
        self.profile.before(self.done)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.done):
            batch = next(self.loader)
            self.state, metrics = self.train_step(self.state, batch, np.float32(multiplier))
        self.read()
        self.done += 1
        self.sent = (self.done, multiplier, metrics)

    def read(self) -> None:
        """Waits for the step that was sent, if there is one, and logs it."""
        if self.sent is None:
            return
        (step, multiplier, metrics), self.sent = self.sent, None
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        train = self.config.train
        if step % train.log_every == 0 or step == train.steps or not math.isfinite(loss):
            record = {
                "step": step,
                "train_loss": loss,
                "lr": multiplier * self.config.optim.muon_lr,
                "grad_norm": grad_norm,
                "tokens": step * self.config.data.batch_tokens,
                "elapsed_seconds": self.stopwatch.seconds,
                **self.meter.stop(step),
            }
            self.writer.write(record)
            self.console.step({**record, "eta": self.seconds_left(step)})
        if not math.isfinite(loss):
            raise NonFinite(f"the loss of step {step:,} is {loss}")
        self.profile.after(step - 1)

    def seconds_left(self, step: int) -> float:
        """Training seconds from the end of `step` to the end of the run, at the speed of late."""
        left = self.meter.eta(self.config.train.steps - step) or 0.0
        cap = self.config.train.max_seconds
        return min(left, max(cap - self.stopwatch.seconds, 0.0)) if cap else left

    def validate(self) -> Score:
        """Scores the validation stream with the parameters as they are, and logs it."""
        config = self.config
        start = time.perf_counter()
        score = score_stream(
            self.state.params,
            self.eval_step,
            self.data.val,
            self.token_bytes,
            self.mesh,
            seq_len=config.data.seq_len,
            device_batch_tokens=config.eval.device_batch_tokens,
            max_tokens=config.eval.tokens,
        )
        if not math.isfinite(score.loss):
            raise NonFinite(f"the validation loss after step {self.done:,} is {score.loss}")
        record = {
            "step": self.done,
            "val_loss": score.loss,
            "val_bpb": score.bpb,
            "val_seconds": time.perf_counter() - start,
        }
        self.writer.write(record)
        self.console.validation(record)
        best = self.position.best_val_loss
        self.position = replace(
            self.position,
            best_val_loss=score.loss if best is None else min(best, score.loss),
            first_val_bpb=score.bpb if self.done == 0 else self.position.first_val_bpb,
        )
        return score

    def save(self, score: Score | None) -> None:
        """Begins to save the state as of the last step, which must have been read."""
        if not all_finite(self.state.params):
            raise NonFinite(f"a parameter is not finite after step {self.done:,}")
        self.position = replace(self.position, elapsed_seconds=self.stopwatch.seconds, data=self.loader.get_state())
        self.checkpoints.save(self.done, self.state, asdict(self.position), value=score.loss if score else None)

    def finish(self) -> dict[str, Any]:
        """Validates and saves the trained model; returns the run's summary."""
        score = self.aside(validation=True, saving=True)
        self.checkpoints.wait()
        assert score is not None
        tokens = self.done * self.config.data.batch_tokens
        return {
            "steps": self.done,
            "tokens": tokens,
            "val_loss": score.loss,
            "val_bpb": score.bpb,
            "val_tokens": score.tokens,
            "best_val_loss": self.position.best_val_loss,
            "untrained_val_bpb": self.position.first_val_bpb,
            "train_seconds": self.stopwatch.seconds,
            "tok_per_s": tokens / self.stopwatch.seconds,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "checkpoint": str(checkpoint.step_folder(run_directory.checkpoint_dir(self.directory), self.done)),
        }


def train(config: Config, directory: Path, console: Console) -> int:
    """Trains into `directory` from where it stands until the recipe's end (0) or a signal (130, 143); the exit status.

    Raises `NonFinite` where the run has diverged, `UserError` where the machine or the directory does not fit the recipe.
    """
    # 1. Devices: how the sequences of a step are dealt out.
    mesh = make_mesh()
    d, t = config.data, config.train
    accumulation = microbatches(d.batch_tokens, t.device_batch_tokens, d.seq_len, mesh.devices.size)
    use_compilation_cache(t.compilation_cache)

    # 2. Data.
    data = prepared_data(config)
    run_directory.keep_tokenizer(directory, data.tokenizer)
    batches = GlobalBatches(data.train, d.batch_tokens, d.seq_len, d.slices, t.seed if d.shuffle else None)
    place = batch_placer(mesh, accumulation)

    # 3. What was asked for, what it will cost, and how each tensor is optimized, before anything is computed.
    plan = make_plan(config)
    peak = peak_flops(jax.devices()[0].device_kind)
    console.header("configuration", settings(config))
    console.header(f"sngpt_jax {__version__}", derived(config, directory, data, plan, accumulation, mesh))
    for line in format_table(describe(config.optim, abstract_params(config))).splitlines():
        console.print(line)

    # 4. State: the last checkpoint that verifies, or a new one.
    folder = run_directory.checkpoint_dir(directory)
    with checkpoint.Checkpointer(folder, keep=t.keep_checkpoints) as checkpoints, StopSignals() as signals:
        restored = checkpoint.restore(folder, abstract_state(config, mesh))
        state = restored.state if restored else init_state(config, mesh)
        done = restored.step if restored else 0
        position = Position(**restored.extra) if restored else Position()
        if restored:
            console.print(f"resuming after step {done:,}")

        # 5. The program.
        console.print("compiling the training step …")
        start = time.perf_counter()
        program = make_train_step(config, mesh).lower(state, place(batches[done]), np.float32(1)).compile()
        console.print(f"compiled in {time.perf_counter() - start:.1f} s")

        # 6. The loop.
        with (
            make_loader(batches, place, num_steps=t.steps, start_step=done) as loader,
            MetricsWriter(directory, resume_step=done if restored else None) as writer,
        ):
            if position.data:
                loader.set_state(position.data)
            run = Run(
                config=config,
                directory=directory,
                console=console,
                mesh=mesh,
                data=data,
                state=state,
                done=done,
                position=position,
                train_step=program,
                loader=loader,
                writer=writer,
                checkpoints=checkpoints,
                meter=StepMeter(d.batch_tokens, plan["flops_per_token"]["train"], peak and peak * mesh.devices.size),
                stopwatch=Stopwatch(position.elapsed_seconds),
                profile=ProfileWindow(directory / "profile", profile_window(t)),
            )
            run.loop(signals)
            if signals.received and run.done < t.steps:
                run.save(None)
                checkpoints.wait()
                return signals.exit_status

            # 7. The result.
            summary = run.finish()
            write_text_atomic(run_directory.summary_path(directory), json.dumps(summary, indent=2) + "\n")
            print_summary(console, summary)
            if config.eval.sample_tokens:
                text = generate(
                    config.model,
                    run.state.params,
                    data.tokenizer,
                    config.eval.sample_prompt,
                    max_tokens=config.eval.sample_tokens,
                    temperature=0.8,
                )
                console.print(f"sample:\n{text}")
            return 0


def settings(config: Config) -> list[tuple[str, str]]:
    """Every field with its value, a section a row."""
    return [(name, ", ".join(f"{k} {v!r}" for k, v in section.items())) for name, section in asdict(config).items()]


def derived(
    config: Config, directory: Path, data: Dataset, plan: dict[str, Any], accumulation: int, mesh: Mesh
) -> list[tuple[str, str]]:
    """What the configuration comes to on this machine, for the head of the log."""
    device_kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(device_kind)
    peak_text = f", {peak / 1e12:,.0f} T a second at most on each device" if peak else ""
    cap = f", at most {config.train.max_seconds:g} s" if config.train.max_seconds else ""
    batch = f"{config.data.batch_tokens:,} tokens in {accumulation} microbatch{'es' * (accumulation > 1)}"
    return [
        ("run", str(directory)),
        ("devices", f"{mesh.devices.size} x {device_kind}"),
        ("data", f"{len(data.train):,} training tokens, {len(data.val):,} for validation"),
        ("parameters", f"{plan['parameters']['total']:,}"),
        ("step", batch),
        ("training", f"{config.train.steps:,} steps, {plan['tokens']['run']:,} tokens{cap}"),
        ("FLOPs", f"{plan['flops_per_token']['train'] / 1e6:,.1f} M a token{peak_text}"),
    ]


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The result of a finished run."""
    untrained = summary["untrained_val_bpb"]
    ratio = f" = {summary['val_bpb'] / untrained:.3f} x the untrained model's {untrained:.4f}" if untrained else ""
    console.header(
        "finished",
        [
            ("training", f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['train_seconds']:,.1f} s"),
            ("speed", f"{summary['tok_per_s']:,.0f} tok/s"),
            ("validation", f"loss {summary['val_loss']:.4f} nats/token, {summary['val_bpb']:.4f} bits/byte{ratio}"),
            ("checkpoint", summary["checkpoint"]),
        ],
    )


@dataclass(frozen=True)
class TrainArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    run_dir: str = ""  # where the run is kept, and resumed from; default: runs/NAME


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        TrainArguments,
        argv,
        program="python -m sngpt_jax.train",
        description="Trains the model of a recipe. The same command again resumes from the last checkpoint.",
    )
    directory = Path(arguments.run_dir or Path("runs") / recipe_name(arguments.config))
    again = shlex.join(["python", "-m", "sngpt_jax.train", *argv])
    cli.log_to_stderr()
    with Console(arguments.overrides.train.steps) as console, run_directory.claim(directory, arguments.overrides):
        summary = run_directory.read_summary(directory)
        if summary:
            print_summary(console, summary)
            return 0
        try:
            status = train(arguments.overrides, directory, console)
        except NonFinite as error:
            saved = checkpoint.steps(run_directory.checkpoint_dir(directory))
            good = f"the last good checkpoint is of step {saved[-1]:,}" if saved else "no checkpoint was saved before"
            print(f"error: {error}; {good} ({directory}); lower the learning rates in a new --run-dir", file=sys.stderr)
            return EXIT_NON_FINITE
    if status:
        print(f"stopped and saved; to go on: {again}", file=sys.stderr)
    return status


if __name__ == "__main__":
    cli.run(main)
