"""The training loop: steps, and between them validation and checkpoints that the training clock
does not count.

The loop sends step N to the device and then reads the metrics of step N-1, so the device does not
wait for the host.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sngpt_jax.base import typed_json
from sngpt_jax.cluster import processes
from sngpt_jax.config import Config, Weights
from sngpt_jax.data.loader import Loader
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import Score, score_stream
from sngpt_jax.evaluation.health import make_health_step, score_health
from sngpt_jax.evaluation.step import make_eval_step
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

FIRST_SNAPSHOT = "the first snapshot in the mean of the weights (SWA)"
ON_GRID = "the matrices are on the exported grid from here on (QAT)"


class NonFinite(Exception):
    """The run has diverged: a loss or a parameter is no longer a finite number, or too many steps
    are skipped.
    """

    def __init__(self, message: str, good: int) -> None:
        """`good`: the last step after which the parameters are known to give a finite loss."""
        super().__init__(message)
        self.good = good


class Stopped(Exception):
    """A signal asked the run to stop."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass(frozen=True)
class Validation:
    """A score and the step it is of."""

    step: int
    loss: float
    bpb: float
    tokens: int


@dataclass(frozen=True)
class Position:
    """Where a run stands, beside its arrays; kept in every checkpoint."""

    elapsed_seconds: float = 0.0  # of training
    imported: bool = False  # whether the first weights come from elsewhere
    first: Validation | None = None  # of the untrained model
    best_val_loss: float | None = None
    latest: Validation | None = None
    # validation BPB of each average that the trained model keeps
    averages: dict[Weights, float] | None = None
    data: dict[str, int] | None = None  # the loader's position

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Position":
        """The position that `asdict` made these values of; of no values, that of a run's start.
        Errors begin with `where`.
        """
        return typed_json.parse(cls, values, where, checkpoint.CheckpointError, defaulted=[])


@dataclass
class Run:
    """The loop, with what it works on."""

    config: Config
    console: Console
    mesh: Mesh
    data: Dataset
    state: TrainState
    done: int  # steps sent so far
    position: Position
    train_step: Callable[[TrainState, Batch, StepControls], tuple[TrainState, Metrics]]
    loader: Loader[Batch]
    writer: MetricsWriter
    checkpoints: checkpoint.Checkpointer
    meter: StepMeter
    profiler: Profiler
    signals: StopSignals
    # the step on the device whose metrics have not been read
    sent: tuple[int, StepControls, Metrics] | None = None

    def __post_init__(self) -> None:
        self.eval_step = make_eval_step(self.config.model, self.mesh)
        measured = self.config.model.levels and self.config.eval.health_tokens
        self.health_step = make_health_step(self.config.model, self.mesh) if measured else None
        self.token_bytes = self.data.tokenizer.token_bytes()
        self.stopwatch = Stopwatch(self.position.elapsed_seconds)
        self.announced: set[str] = set()  # what has been said once
        if self.state.swa is not None and int(self.state.swa.count):
            self.announced.add(FIRST_SNAPSHOT)

    def loop(self) -> None:
        """Steps until the recipe's last one or its wall-clock cap; raises `Stopped` on a signal.
        Every step is read then.
        """
        train, every = self.config.train, self.config.eval.every
        if (
            every
            and self.done % every == 0
            and not (self.position.latest and self.position.latest.step == self.done)
        ):
            # at the start, or where a signal has ended this validation: its score is the
            # checkpoint's then, too
            self.aside(validating=True, saving=self.done > 0)
        self.meter.start(self.done)
        seconds = self.agree_on_time()
        while self.done < train.steps and not (train.max_seconds and seconds >= train.max_seconds):
            self.step(seconds)
            validating = bool(every) and self.done % every == 0
            saving = bool(train.checkpoint_every) and self.done % train.checkpoint_every == 0
            if (validating or saving) and self.done < train.steps:
                self.aside(validating, saving)
            try:
                seconds = self.agree_on_time()
            except Stopped:
                self.read()
                raise
        self.read()
        self.console.flush()

    def agree_on_time(self) -> float:
        """Broadcasts process 0's seconds of training to all processes.

        Raises `Stopped` in all processes after a signal has reached one of them.
        """
        seconds, signal = processes.agree(self.stopwatch.seconds, self.signals.received)
        if signal:
            raise Stopped(signal)
        return seconds

    def step(self, seconds: float) -> None:
        """Sends the step that begins after so many seconds of training to the device, then reads
        the one before it.
        """
        config, number = self.config, self.done + 1
        if self.profiler.begins_with(number):
            self.off_the_clock(self.profiler.start)
        controls = step_controls(config.optim, config.train, self.done, seconds)
        for text, on in ((FIRST_SNAPSHOT, controls.swa), (ON_GRID, controls.qat)):
            if on and text not in self.announced:
                self.announced.add(text)
                self.console.print(f"step {number:,}: {text}")
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch = next(self.loader)
            if self.sent and self.sent[2]["loss"].is_ready():  # type: ignore[attr-defined]
                # the next step may not come back before it is done, as on a CPU
                self.meter.ended(self.sent[0])
            self.state, metrics = self.train_step(self.state, batch, controls)
        self.read()
        self.done, self.sent = number, (number, controls, metrics)
        self.checkpoints.check()
        if self.profiler.ends_with(number):
            self.off_the_clock(self.profiler.stop)

    def read(self) -> None:
        """Waits for the step that was sent, if there is one, and logs it."""
        if self.sent is None:
            return
        (step, controls, metrics), self.sent = self.sent, None
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        skipped = {
            name: int(metrics[name]) for name in ("skipped", "skipped_in_a_row") if name in metrics
        }
        in_a_row = skipped.pop("skipped_in_a_row", 0)
        train = self.config.train
        if (
            step % train.log_every == 0
            or step == train.steps
            or in_a_row
            or not math.isfinite(loss)
        ):
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
            what = f"loss {loss:.4f}, gradient norm {grad_norm:.3g}"
            self.console.print(f"step {step:,}: skipped, {what}; {skipped['skipped']:,} so far")
            if in_a_row > (most := train.max_skipped_steps):
                message = (
                    f"step {step:,}, {what}, is skipped number {in_a_row} in a row;"
                    f" train.max_skipped_steps = {most}"
                )
                raise NonFinite(message, good=step - in_a_row - 1)
        elif not math.isfinite(loss):
            raise NonFinite(f"the loss of step {step:,} is {loss}", good=step - 2)

    def off_the_clock(self, work: Callable[[], None]) -> None:
        """Does `work` once every step has been read, outside of the training time."""
        self.read()
        with self.stopwatch.paused():
            work()
        self.meter.start(self.done)

    def aside(self, validating: bool, saving: bool) -> None:
        """Validates, saves, or both, off the clock."""

        def work() -> None:
            if validating:
                self.validate()
            if saving:
                self.save()

        self.off_the_clock(work)

    def seconds_left(self, step: int) -> float:
        """Training seconds from the end of `step` to the end of the run, at the speed of late."""
        left = self.meter.eta(self.config.train.steps - step) or 0.0
        cap = self.config.train.max_seconds
        return min(left, max(cap - self.stopwatch.seconds, 0.0)) if cap else left

    def score(self, variables: Variables) -> Score:
        """The score of `variables` on the validation stream; raises `Stopped` on a signal."""
        config = self.config
        return score_stream(
            variables,
            self.eval_step,
            self.data.val,
            self.token_bytes,
            self.mesh,
            standard_windows(len(self.data.val), config.data.seq_len, config.eval.tokens),
            device_batch_tokens=config.eval.device_batch_tokens,
            progress=self.stoppable("validation"),
        )

    def stoppable(self, what: str) -> Callable[[int, int], None]:
        """Reports the progress of `what`, done and total, and raises `Stopped` once a signal has
        asked for it.
        """
        report = self.console.progress(what)

        def progress(done: int, total: int) -> None:
            self.agree_on_time()
            report(done, total)

        return progress

    def validate(self) -> None:
        """Scores the validation stream with the parameters as they are, and logs it; a score that
        is there already stands.
        """
        if self.position.latest and self.position.latest.step == self.done:
            return
        start = time.perf_counter()
        score = self.score(self.state.variables())
        if not math.isfinite(score.loss):
            raise NonFinite(
                f"the validation loss after step {self.done:,} is {score.loss}", good=self.done - 1
            )
        seconds = time.perf_counter() - start
        record = {
            "step": self.done,
            "val_loss": score.loss,
            "val_bpb": score.bpb,
            "val_seconds": seconds,
        }
        self.writer.write(record)
        self.console.validation(record)
        best = self.position.best_val_loss
        latest = Validation(self.done, score.loss, score.bpb, score.tokens)
        self.position = replace(
            self.position,
            first=latest if self.done == 0 and not self.position.imported else self.position.first,
            best_val_loss=score.loss if best is None else min(best, score.loss),
            latest=latest,
        )
        if self.health_step:
            self.log_health(self.health_step)

    def log_health(self, health_step: jax.stages.Wrapped) -> None:
        """Measures and logs the health of the sparse codes, on the start of the validation stream."""
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
        self.writer.write(
            {"step": self.done, **health.record(), "code/seconds": time.perf_counter() - start}
        )
        self.console.print(health.line())

    def save(self) -> None:
        """Begins to save the state as of the last step."""
        if not all_finite(self.state.params):
            raise NonFinite(
                f"a parameter is not finite after step {self.done:,}", good=self.done - 1
            )
        self.position = replace(
            self.position, elapsed_seconds=self.stopwatch.seconds, data=self.loader.get_state()
        )
        latest = self.position.latest
        value = latest.loss if latest and latest.step == self.done else None
        self.checkpoints.save(self.done, self.state, asdict(self.position), value=value)

    def weights(self) -> dict[Weights, Variables]:
        """The last step's weights and the averages of them that hold something by now, with the
        statistics.
        """
        found: dict[Weights, Variables] = {"final": self.state.variables()}
        if self.state.swa is not None and int(self.state.swa.count):
            found["swa"] = self.state.variables(averaged_weights(self.state.swa, self.mesh))
        if self.state.ema is not None:
            found["ema"] = self.state.variables(averaged_weights(self.state.ema, self.mesh))
        return found

    def finish(self, directory: Path) -> Summary:
        """Validates and saves the trained model, and validates its averages; returns the run's
        summary.
        """
        self.aside(validating=True, saving=True)
        bpb: dict[Weights, float] = self.position.averages or {}
        averages = {
            name: variables for name, variables in self.weights().items() if name != "final"
        }
        # else they were scored before an interruption
        if averages and self.position.averages is None:
            for name, variables in averages.items():
                score = self.score(variables)
                self.writer.write(
                    {
                        "step": self.done,
                        f"{name}_val_loss": score.loss,
                        f"{name}_val_bpb": score.bpb,
                    }
                )
                bpb[name] = score.bpb
            self.position = replace(self.position, averages=bpb)
            # the same arrays, so only the position is written anew
            self.aside(validating=False, saving=True)
        self.checkpoints.wait()
        first, latest, best = self.position.first, self.position.latest, self.position.best_val_loss
        assert latest is not None and best is not None
        tokens, seconds = self.done * self.config.data.batch_tokens, self.position.elapsed_seconds
        return Summary(
            steps=self.done,
            tokens=tokens,
            val_loss=latest.loss,
            val_bpb=latest.bpb,
            val_tokens=latest.tokens,
            best_val_loss=best,
            untrained_val_bpb=first.bpb if first else None,
            swa_val_bpb=bpb.get("swa"),
            ema_val_bpb=bpb.get("ema"),
            train_seconds=seconds,
            tok_per_s=tokens / seconds,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            checkpoint=str(
                checkpoint.step_folder(run_directory.checkpoint_dir(directory), self.done)
            ),
        )
