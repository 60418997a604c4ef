"""How fast a recipe trains here: `python -m sngpt_jax.bench --config quickstart [--against torch]
[--json [PATH]]`.

Alone: the step as `train` runs it, batches read and placed in the background. Against PyTorch: the
same model, weights, batches and optimizer in `torch_model.py` and `torch_step.py`, eager and by
torch.compile, all in one process and in turn, so that a busy moment falls on none alone; before
anything is timed the losses of the first steps are held together, in float32. Averages of the
weights and late quantization are left out on both sides. Batches are random tokens.
"""

import dataclasses
import importlib.util
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np
from jax.sharding import Mesh
from sngpt_kernels.dispatch import current_device

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import batch_placer, make_mesh, path_name
from sngpt_jax.config import Config, microbatches
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.config.recipe import Overrides, parse_command
from sngpt_jax.data.loader import make_loader
from sngpt_jax.model.layers import compute_dtype
from sngpt_jax.optim.schedules import step_controls
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.run.meter import peak_flops, peak_memory
from sngpt_jax.training import compiler
from sngpt_jax.training.compiler import keep_working_memory, use_compilation_cache
from sngpt_jax.training.cost import forward_flops_per_token
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.training.step import make_train_step

# whose losses are compared: the outputs of the blocks start at zero and are seen from the second
# step on
FIRST_STEPS = 4
# between those losses in float32; bfloat16 would hide a model without rotary positions
LARGEST_DIFFERENCE = 2e-4
CHECKED_ROWS = 4  # of each of the two microbatches that these steps take


@dataclass(frozen=True)
class RandomBatches:
    """Batches by step, as `data.loader.GlobalBatches` gives them, of tokens drawn at random."""

    config: Config

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        d = self.config.data
        shape = (d.batch_tokens // d.seq_len, d.seq_len + 1)
        tokens = np.random.default_rng([0, operator.index(step)]).integers(
            self.config.model.vocab_size, size=shape, dtype=np.uint16
        )
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@dataclass(frozen=True)
class Round:
    """What a number of steps took."""

    seconds: float  # from the first batch asked for to the last loss read
    busy: float  # seconds of all of the process's threads together
    losses: tuple[float, ...]
    waiting: float = 0.0  # seconds in which the host waited for batches
    # those, and the host's own work for the steps; where the CPU is the device, without running
    # them
    host: float = 0.0
    memory: int = 0  # the most bytes taken so far


class OurStep:
    """The step of this package, called as the training loop does: step N is sent before the loss
    of step N-1 is read.
    """

    def __init__(self, config: Config, mesh: Mesh):
        d, self.config, self.done = config.data, config, 0
        accumulation = microbatches(
            d.batch_tokens, config.train.device_batch_tokens, d.seq_len, mesh.devices.size
        )
        place, batches = batch_placer(mesh, accumulation), RandomBatches(config)
        shapes = Shapes.of(config, mesh)
        self.state = init_state(shapes)
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        # the step takes the arrays for its own
        self.weights = {path_name(path): np.array(leaf) for path, leaf in leaves}
        controls = step_controls(config.optim, config.train, 0, 0.0)
        self.program = compiler.compile_step(
            make_train_step(shapes).lower(self.state, place(batches[0]), controls)
        )
        self.is_inline = mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self.loader = make_loader(batches, place, num_steps=len(batches))

    def __call__(self, steps: int) -> Round:
        """Does so many steps."""
        losses: list[jax.Array] = []
        waiting = host = 0.0
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.loader)
            given = time.perf_counter()
            controls = step_controls(self.config.optim, self.config.train, self.done, 0.0)
            ready = time.perf_counter()
            self.state, metrics = self.program(self.state, batch, controls)
            sent = time.perf_counter()
            waiting, host = (
                waiting + given - asked,
                host + (ready if self.is_inline else sent) - asked,
            )
            if losses:
                losses[-1].block_until_ready()
            losses.append(metrics["loss"])
            self.done += 1
        values = tuple(map(float, losses))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        return Round(seconds, busy, values, waiting, host, peak_memory(jax.local_devices()[0]))


class TheirStep:
    """The same in PyTorch."""

    def __init__(self, config: Config, weights: dict[str, np.ndarray], compiled: bool):
        from sngpt_jax.bench.torch_step import TorchStep  # PyTorch is an extra

        self.config, self.batches, self.done = config, RandomBatches(config), 0
        self.step = TorchStep(config, weights, compiled)

    def __call__(self, steps: int) -> Round:
        """Does so many steps."""
        losses = []
        # not timed: ours come in the background
        placed = [self.step.place(self.batches[self.done + i]) for i in range(steps)]
        start, busy = time.perf_counter(), time.process_time()
        for batch in placed:
            controls = step_controls(self.config.optim, self.config.train, self.done, 0.0)
            losses.append(
                self.step(batch, float(controls.lr_multiplier), float(controls.adam_lr_multiplier))
            )
            self.done += 1
        values = tuple(map(float, losses))
        return Round(time.perf_counter() - start, time.process_time() - busy, values)


Step = Callable[[int], Round]


def check_torch(config: Config) -> None:
    """Raises `UserError` where the model is none of those that `torch_model.py` has, or PyTorch
    lacks jax's device.
    """
    if config.model.family != "compact":
        raise UserError(
            f"--against torch: model.family = {config.model.family} is not written in PyTorch;"
            " compact is"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "--against torch: PyTorch is not installed; run:"
            f" {cli.command('pip', 'install', 'torch')}"
        )
    import torch  # an extra

    theirs, ours = "cuda" if torch.cuda.is_available() else "cpu", current_device().platform
    if theirs != ours:
        raise UserError(
            f"--against torch: PyTorch runs on {theirs} here and jax on {ours}; install both for"
            " the same device"
        )
    if config.optim.grad_clip_scope != "global":
        raise UserError(
            "--against torch: set optim.grad_clip_scope to global, which on one device is the same"
        )


def comparable(config: Config) -> Config:
    """The recipe without what neither side of a comparison does: averages of the weights and late
    quantization.
    """
    optim = dataclasses.replace(config.optim, ema_decay=0.0, swa_every=0, qat_below=0.0)
    return dataclasses.replace(
        config, optim=optim, eval=dataclasses.replace(config.eval, weights="final")
    )


def first_losses(config: Config, mesh: Mesh) -> dict[str, tuple[float, ...]]:
    """The losses of the first steps here and in PyTorch, float32, of short batches. Raises
    `UserError` where they differ.
    """
    data, rows = (
        config.data,
        min(CHECKED_ROWS, config.train.device_batch_tokens // config.data.seq_len),
    )
    short = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, compute_dtype="float32"),
        optim=dataclasses.replace(config.optim, newton_schulz_dtype="float32"),
        data=dataclasses.replace(data, batch_tokens=2 * rows * data.seq_len),
        train=dataclasses.replace(config.train, device_batch_tokens=rows * data.seq_len),
    )
    with jax.default_matmul_precision("highest"):
        ours = OurStep(short, mesh)
        with ours.loader:
            losses = {"jax": ours(FIRST_STEPS).losses}
    losses["torch"] = TheirStep(short, ours.weights, compiled=False)(FIRST_STEPS).losses
    if not np.abs(np.subtract(losses["jax"], losses["torch"])).max() <= LARGEST_DIFFERENCE:
        jaxs, torchs = (
            ", ".join(f"{loss:.4f}" for loss in losses[name]) for name in ("jax", "torch")
        )
        raise UserError(
            f"torch_model.py is not the same model: its first losses are {torchs}, jax's {jaxs}"
        )
    return losses


def measure(steps: dict[str, Step], rounds: int, steps_per_round: int) -> dict[str, list[Round]]:
    """So many rounds of each, in turn."""
    found: dict[str, list[Round]] = {name: [] for name in steps}
    progress = progress_reporter("rounds")
    for turn in range(rounds):
        for name, step in steps.items():
            found[name].append(step(steps_per_round))
        progress(turn + 1, rounds)
    return found


def summary(rounds: Sequence[Round], steps: int, tokens: int) -> dict[str, float]:
    """Tokens a second (median and quartiles over the rounds), and how many of the processor's
    cores were busy.
    """
    low, middle, high = (
        float(x)
        for x in np.quantile([steps * tokens / r.seconds for r in rounds], [0.25, 0.5, 0.75])
    )
    return {
        "tok_per_s": middle,
        "tok_per_s_low": low,
        "tok_per_s_high": high,
        "busy_cores": statistics.median(r.busy / r.seconds for r in rounds),
    }


@dataclass(frozen=True)
class BenchArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    # torch: the same model in PyTorch too, eager and compiled, on one device
    against: Literal["none", "torch"] = "none"
    rounds: int = 9  # in which all take their turn
    steps: int = 10  # of each in a round
    json: Json = ""
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        BenchArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.bench",
        description=(
            "Times the training step of a recipe on the device at hand, alone or beside the same"
            " model in PyTorch."
        ),
    )
    cli.log_to_stderr(arguments.quiet)
    if min(arguments.rounds, arguments.steps) < 1:
        raise UserError("--rounds and --steps are 1 or more")
    cli.check_json(arguments.json)
    config, against = arguments.overrides, arguments.against == "torch"
    keep_working_memory()
    if against:
        check_torch(config)
        config = comparable(config)
    use_compilation_cache(config.train.compilation_cache)
    mesh = make_mesh(jax.devices()[:1]) if against else make_mesh(fsdp=config.train.fsdp)

    losses = first_losses(config, mesh) if against else {}
    ours = OurStep(config, mesh)
    steps: dict[str, Step] = {"jax": ours}
    if against:
        steps |= {
            "torch eager": TheirStep(config, ours.weights, False),
            "torch.compile": TheirStep(config, ours.weights, True),
        }
    with ours.loader:
        for step in steps.values():
            step(1)  # compiles
        found = measure(steps, arguments.rounds, arguments.steps)

    tokens, device = config.data.batch_tokens, mesh.devices.flat[0].device_kind
    rows = {name: summary(rounds, arguments.steps, tokens) for name, rounds in found.items()}
    peak = peak_flops(device)
    model_flops = rows["jax"]["tok_per_s"] * 3 * forward_flops_per_token(config)
    total = sum(r.seconds for r in found["jax"])
    result: dict[str, Any] = {
        "device": device,
        "devices": mesh.devices.size,
        "cores": (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "first_losses": losses,
        "speed": rows,
        "jax_to": {
            name: rows["jax"]["tok_per_s"] / row["tok_per_s"]
            for name, row in rows.items()
            if name != "jax"
        },
        "step_ms": 1e3 * tokens / rows["jax"]["tok_per_s"],
        "model_flops_per_s": model_flops,
        "mfu": model_flops / (peak * mesh.devices.size) if peak else None,
        "host_share": sum(r.host for r in found["jax"]) / total,
        "input_wait_share": sum(r.waiting for r in found["jax"]) / total,
        "peak_memory": {
            "first_round": found["jax"][0].memory,
            "last_round": found["jax"][-1].memory,
        },
    }
    if arguments.json != "-":
        print(table(result, config))
    cli.write_json(result, arguments.json)
    return 0


def table(result: dict[str, Any], config: Config) -> str:
    """The result for a person."""
    lines = [
        (
            f"{result['devices']} x {device_name(result)}; {config.data.batch_tokens:,} tokens a"
            f" step in microbatches of at most {config.train.device_batch_tokens:,} a device,"
            f" {compute_dtype(config.model).name}"
        ),
        f"{'':14}{'tok/s':>12}{'quartiles':>22}{'busy cores':>12}{'jax is':>10}",
    ]
    for name, row in result["speed"].items():
        quartiles = f"{row['tok_per_s_low']:,.0f} to {row['tok_per_s_high']:,.0f}"
        ratio = f"{result['jax_to'][name]:.2f} x" if name in result["jax_to"] else ""
        lines.append(
            f"{name:14}{row['tok_per_s']:>12,.0f}{quartiles:>22}{row['busy_cores']:>12.2f}{ratio:>10}"
        )
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] is not None else ""
    lines.append(
        f"jax: {result['step_ms']:,.1f} ms a step, {result['model_flops_per_s'] / 1e9:,.1f} GFLOP/s"
        f" of the model's{mfu}; host {result['host_share']:.2%} of the time, of which"
        f" {result['input_wait_share']:.2%} waiting for batches; memory"
        f" {result['peak_memory']['first_round'] / 1e9:.3f} GB at most after the first round,"
        f" {result['peak_memory']['last_round'] / 1e9:.3f} after the last"
    )
    if result["jax_to"]:
        first = ", ".join(f"{loss:.4f}" for loss in result["first_losses"]["jax"])
        lines.append(
            f"one model: in float32 the first losses of both are {first}, within"
            f" {LARGEST_DIFFERENCE:g}"
        )
    return "\n".join(lines)


def device_name(result: dict[str, Any]) -> str:
    """The device, with its cores where it is the processor."""
    return (
        f"{result['device']} of {result['cores']} cores"
        if result["device"] == "cpu"
        else str(result["device"])
    )


if __name__ == "__main__":
    cli.run(main)
