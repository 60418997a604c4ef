"""The training loop: steps, with validation and checkpoints between them, off the training clock.

The loop sends step N to the device and then reads the metrics of step N-1, so that the device does
not wait for the host.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sngpt_jax.base import typed_json
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.config import ByteCount, Config, Weights
from sngpt_jax.data.identity import validation_name
from sngpt_jax.data.loader import Loader
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import Pass, Score
from sngpt_jax.evaluation.health import make_health_step, score_health
from sngpt_jax.evaluation.windows import standard_windows
from sngpt_jax.model.forward import Batch, Variables
from sngpt_jax.optim.averaging import averaged_weights
from sngpt_jax.optim.schedules import StepControls, step_controls
from sngpt_jax.run import checkpoint
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run.clock import Stopwatch
from sngpt_jax.run.console import Console
from sngpt_jax.run.directory import Summary
from sngpt_jax.run.meter import StepMeter
from sngpt_jax.run.metrics import MetricsWriter
from sngpt_jax.run.profiler import Profiler
from sngpt_jax.run.signals import StopSignals
from sngpt_jax.training.state import TrainState
from sngpt_jax.training.step import Metrics, all_finite


class NonFinite(Exception):
    """The run has diverged. `good` is the last step whose parameters gave a finite loss."""

    def __init__(self, message: str, good: int) -> None:
        super().__init__(message)
        self.good = good


class Stopped(Exception):
    """A signal asked the run to stop."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass(frozen=True)
class Validation:
    """The score after a step."""

    step: int
    loss: float
    bpb: float
    tokens: int
    byte_count: ByteCount = "golf"  # checkpoints without the field were made with this count


@dataclass(frozen=True)
class Position:
    """The progress of a run besides its arrays. Every checkpoint holds it."""

    elapsed_seconds: float = 0.0  # of training
    imported: bool = False  # whether the initial weights were imported
    first: Validation | None = None  # of the untrained model
    best_val_loss: float | None = None
    latest: Validation | None = None
    averages: dict[Weights, float] | None = None  # BPB of the trained model's averages
    data: dict[str, int] | None = None  # the loader's position
    skipped_in_a_row: int = 0  # steps up to this one; such a save does not replace an older one

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Position":
        """The position from the values of `asdict`, or a run's start for missing ones."""
        return typed_json.parse(cls, values, where, checkpoint.CheckpointError, defaulted=[])


@dataclass
class Run:
    """The loop and its state."""

    config: Config
    console: Console
    mesh: Mesh
    data: Dataset
    state: TrainState
    done: int  # steps sent so far
    position: Position
    train_step: Callable[[TrainState, Batch, StepControls], tuple[TrainState, Metrics]]
    eval_step: Fitted
    loader: Loader
    writer: MetricsWriter
    checkpoints: checkpoint.Checkpointer
    meter: StepMeter
    profiler: Profiler
    signals: StopSignals
    sent: tuple[int, StepControls, Metrics] | None = None  # the step whose metrics are unread

    def __post_init__(self) -> None:
        measured = self.config.model.levels and self.config.eval.health_tokens
        self.health_step = None
        if measured:
            step = make_health_step(self.config.model, self.mesh)
            self.health_step = Fitted(step, self.mesh, "the health of the codes")
        self.token_bytes = self.data.tokenizer.token_bytes()
        self.stopwatch = Stopwatch(self.position.elapsed_seconds)

    def loop(self) -> None:
        """Runs steps until the recipe's last one or its limit of time, and reads all metrics.

        Raises `Stopped` on a signal.
        """
        train, validate_every = self.config.train, self.config.eval.every

        def is_due(every: int) -> bool:
            return bool(every) and self.done % every == 0

        if is_due(validate_every) and not self.current_score():
            # at the start, or after a signal has ended this validation
            self.aside(validating=True, saving=self.done > 0)
        self.meter.start(self.done)
        seconds = self.agree_on_time()
        while self.done < train.steps and not (train.max_seconds and seconds >= train.max_seconds):
            self.step(seconds)
            validating, saving = is_due(validate_every), is_due(train.checkpoint_every)
            if (validating or saving) and self.done < train.steps:
                self.aside(validating, saving)
            seconds = self.agree_on_time()
        self.read()
        self.console.flush()

    def current_score(self) -> Validation | None:
        """The score of the current parameters, if they have one."""
        latest = self.position.latest
        return latest if latest and latest.step == self.done else None

    def agree_on_time(self) -> float:
        """Process 0's seconds of training, in all processes.

        Raises `Stopped` in all of them after a signal has reached one.
        """
        seconds, signal = processes.agree(self.stopwatch.seconds, self.signals.received)
        if signal:
            raise Stopped(signal)
        return seconds

    def step(self, seconds: float) -> None:
        """Sends the step that begins after `seconds` of training, then reads the step before it."""
        config, number = self.config, self.done + 1
        if self.profiler.begins_with(number):
            with self.off_the_clock():
                self.profiler.start()
        controls = step_controls(config.optim, config.train, self.done, seconds)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch = next(self.loader)
            # on a CPU the next call returns only after its step, so the end is noted before it
            if self.sent and self.sent[2]["loss"].is_ready():  # type: ignore[attr-defined]
                self.meter.ended(self.sent[0])
            self.state, metrics = self.train_step(self.state, batch, controls)
        self.read()
        self.done, self.sent = number, (number, controls, metrics)
        self.checkpoints.check()
        if self.profiler.ends_with(number):
            with self.off_the_clock():
                self.profiler.stop()

    def read(self) -> None:
        """Waits for the step that was sent, if there is one, and logs it."""
        if self.sent is None:
            return
        (step, controls, metrics), self.sent = self.sent, None
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        skipped = {"skipped": int(metrics["skipped"])} if "skipped" in metrics else {}
        in_a_row = int(metrics.get("skipped_in_a_row", 0))
        self.position = replace(self.position, skipped_in_a_row=in_a_row)
        train, finite = self.config.train, math.isfinite(loss)
        if step % train.log_every == 0 or step == train.steps or in_a_row or not finite:
            record = {
                "step": step,
                "train_loss": loss,
                "lr": float(controls.lr_multiplier) * self.config.optim.muon_lr,
                "grad_norm": grad_norm,
                "tokens": step * self.config.data.batch_tokens,
                "elapsed_seconds": self.stopwatch.seconds,
                **({"qat": bool(controls.qat)} if self.config.optim.qat_below else {}),
                **skipped,
                **self.meter.stop(step),
            }
            self.writer.write(record)
            self.console.step({**record, "eta": self.seconds_left(step)})
        if in_a_row:
            measured = f"loss {loss:.4f}, gradient norm {grad_norm:.3g}"
            so_far = f"{skipped['skipped']:,} so far"
            self.console.print(f"step {step:,}: skipped, {measured}; {so_far}")
            if in_a_row > (most := train.max_skipped_steps):
                which = f"step {step:,}, {measured}, is skipped number {in_a_row} in a row"
                raise NonFinite(
                    f"{which}; train.max_skipped_steps = {most}", good=step - in_a_row - 1
                )
        elif not finite:
            raise NonFinite(f"the loss of step {step:,} is {loss}", good=step - 2)

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Reads every step, then runs the body outside of the training time."""
        self.read()
        with self.stopwatch.paused():
            yield
        self.meter.start(self.done)

    def aside(self, validating: bool, saving: bool) -> None:
        """Validates, saves, or does both, off the clock."""
        with self.off_the_clock():
            if validating:
                self.validate()
            if saving:
                self.save()

    def seconds_left(self, step: int) -> float:
        """Training seconds from `step` to the end of the run, at the recent speed."""
        left = self.meter.eta(self.config.train.steps - step) or 0.0
        cap = self.config.train.max_seconds
        return min(left, max(cap - self.stopwatch.seconds, 0.0)) if cap else left

    def score(self, variables: Variables) -> Score:
        """Scores `variables` on the validation stream. Raises `Stopped` on a signal."""
        config = self.config
        return Pass(
            variables,
            self.eval_step,
            self.data.val,
            self.token_bytes,
            self.mesh,
            standard_windows(len(self.data.val), config.data.seq_len, config.eval.tokens),
            config.eval.device_batch_tokens,
            self.stoppable("validation"),
            config.eval.byte_count,
        ).score()

    def stoppable(self, what: str) -> Callable[[int, int], None]:
        """Reports the progress of `what`, and raises `Stopped` after a signal."""
        report = self.console.progress(what)

        def progress(done: int, total: int) -> None:
            self.agree_on_time()
            report(done, total)

        return progress

    def validate(self) -> None:
        """Scores the current parameters, if they have no score yet, and logs the score."""
        if self.current_score():
            return
        start = time.perf_counter()
        score = self.score(self.state.variables())
        if not math.isfinite(score.loss):
            raise NonFinite(
                f"the validation loss after step {self.done:,} is {score.loss}", good=self.done - 1
            )
        record = {
            "step": self.done,
            "val_loss": score.loss,
            "val_bpb": score.bpb,
            "val_byte_count": score.byte_count,
            "val_seconds": time.perf_counter() - start,
        }
        self.writer.write(record)
        self.console.validation(record)
        about = score.loss, score.bpb, score.tokens, score.byte_count
        latest, before = Validation(self.done, *about), self.position
        best = min(score.loss, math.inf if before.best_val_loss is None else before.best_val_loss)
        self.position = replace(before, latest=latest, best_val_loss=best)
        if self.done == 0 and not before.imported:
            self.position = replace(self.position, first=latest)
        if self.health_step:
            self.log_health(self.health_step)

    def log_health(self, health_step: Fitted) -> None:
        """Logs the health of the sparse codes on the start of the validation stream."""
        start = time.perf_counter()
        health = score_health(
            self.config,
            self.state.variables(),
            health_step,
            self.data.val,
            self.mesh,
            step=self.done,
            progress=self.stoppable("code"),
        )
        seconds = time.perf_counter() - start
        self.writer.write({"step": self.done, **health.record(), "code/seconds": seconds})
        self.console.print(health.line())

    def save(self) -> None:
        """Begins to save the state after the last step."""
        if not all_finite(self.state.params):
            raise NonFinite(
                f"a parameter is not finite after step {self.done:,}", good=self.done - 1
            )
        self.position = replace(
            self.position, elapsed_seconds=self.stopwatch.seconds, data=self.loader.get_state()
        )
        value = score.loss if (score := self.current_score()) else None
        self.checkpoints.save(self.done, self.state, asdict(self.position), value=value)

    def weights(self) -> dict[Weights, Variables]:
        """The variables with the last step's weights, and with each average that is not empty."""
        state = self.state
        found: dict[Weights, Variables] = {"final": state.variables()}
        if state.swa is not None and int(state.swa.count):
            found["swa"] = state.variables(averaged_weights(state.swa, self.mesh))
        if state.ema is not None:
            found["ema"] = state.variables(averaged_weights(state.ema, self.mesh))
        return found

    def finish(self, directory: Path) -> Summary:
        """Validates and saves the trained model, validates its averages, and sums up."""
        self.aside(validating=True, saving=True)
        averages = self.weights()
        del averages["final"]
        if averages and self.position.averages is None:  # not scored before an interruption
            bpb: dict[Weights, float] = {}
            for name, variables in averages.items():
                score = self.score(variables)
                scores = {f"{name}_val_loss": score.loss, f"{name}_val_bpb": score.bpb}
                self.writer.write({"step": self.done, **scores})
                bpb[name] = score.bpb
            self.position = replace(self.position, averages=bpb)
            self.aside(validating=False, saving=True)  # only the position is written again
        self.checkpoints.wait()
        position, folder = self.position, run_directory.checkpoint_dir(directory)
        latest, bpb = position.latest, position.averages or {}
        assert latest is not None and position.best_val_loss is not None
        data = validation_name(self.data)
        tokens, seconds = self.done * self.config.data.batch_tokens, position.elapsed_seconds
        return Summary(
            steps=self.done,
            tokens=tokens,
            val_loss=latest.loss,
            val_bpb=latest.bpb,
            val_tokens=latest.tokens,
            val_byte_count=latest.byte_count,
            best_val_loss=position.best_val_loss,
            untrained_val_bpb=position.first.bpb if position.first else None,
            swa_val_bpb=bpb.get("swa"),
            ema_val_bpb=bpb.get("ema"),
            train_seconds=seconds,
            tok_per_s=tokens / seconds,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            checkpoint=str(checkpoint.step_folder(folder, self.done)),
            val_data=data.name,
            val_hash=data.hash,
        )
