"""The speed of a recipe's training step: `python -m sngpt_jax.bench --config quickstart`.

Alone, the step runs as `train` runs it, and batches are read and placed in the background. With
`--against torch` the same model trains in PyTorch too (`torch_model`, `torch_step`), eager and by
torch.compile. All implementations take turns in one process, from the same weights and on the same
batches of random tokens. Before timing, the losses of the first steps are compared in float32. Both
sides omit averages of the weights and late quantization.
"""

import importlib.util
import operator
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.sharding import Mesh
from sngpt_kernels.dispatch import current_device

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import harness
from sngpt_jax.bench.arguments import StepArguments
from sngpt_jax.cluster.mesh import batch_placer, leaves_by_path, make_mesh
from sngpt_jax.config import Config
from sngpt_jax.data.loader import make_loader
from sngpt_jax.model.layers import compute_dtype
from sngpt_jax.optim.schedules import step_controls
from sngpt_jax.run.meter import peak_flops, peak_memory
from sngpt_jax.training import fitting, trust
from sngpt_jax.training.compiler import compile_step, keep_working_memory, use_compilation_cache
from sngpt_jax.training.cost import forward_flops_per_token
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.training.step import make_train_step

# Steps whose losses are compared. The outputs of the blocks start at zero and show in the losses
# from the second step on.
FIRST_STEPS = 4
# The largest difference of those losses in float32. bfloat16 would hide missing rotary positions.
LARGEST_DIFFERENCE = 2e-4
CHECKED_ROWS = 4  # rows of each of the two microbatches of those steps


@dataclass(frozen=True)
class RandomBatches:
    """Batches of random tokens by step, like `data.loader.GlobalBatches`."""

    config: Config

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        data, rng = self.config.data, np.random.default_rng([0, operator.index(step)])
        shape = (data.batch_tokens // data.seq_len, data.seq_len + 1)
        tokens = rng.integers(self.config.model.vocab_size, size=shape, dtype=np.uint16)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@dataclass(frozen=True)
class Round:
    """The figures of some steps."""

    seconds: float  # from the request of the first batch until the last loss is read
    busy: float  # CPU seconds of all threads of the process
    losses: tuple[float, ...]
    waiting: float = 0.0  # seconds in which the host waited for batches
    # `waiting`, and the host's work for the steps. On a CPU it excludes the steps themselves.
    host: float = 0.0
    memory: int = 0  # peak bytes so far

    @classmethod
    def since(cls, start: float, busy: float, losses: Sequence[Any], **rest: Any) -> "Round":
        """A round that began at these readings of the clocks, after its last loss is read."""
        values = tuple(map(float, losses))
        return cls(time.perf_counter() - start, time.process_time() - busy, values, **rest)


class OurStep:
    """This package's step. As in `train`, step N starts before the loss of N-1 is read."""

    def __init__(self, config: Config, mesh: Mesh):
        devices, batches, shapes = mesh.devices, RandomBatches(config), Shapes.of(config, mesh)
        place = batch_placer(mesh, fitting.accumulation_of(shapes))
        self.controls = partial(step_controls, config.optim, config.train, elapsed_seconds=0.0)
        self.program = compile_step(
            make_train_step(shapes).lower(shapes.state, place(batches[0]), self.controls(0))
        )
        fitting.check(shapes, self.program)
        self.state, self.done = init_state(shapes), 0
        # copies, because the step donates the arrays
        self.weights = {p: np.array(leaf) for p, leaf in leaves_by_path(self.state.params).items()}
        self.is_inline = devices.size == 1 and devices.flat[0].platform == "cpu"
        self.loader = make_loader(batches, place, num_steps=len(batches))

    def __call__(self, steps: int) -> Round:
        losses: list[jax.Array] = []
        waiting = host = 0.0
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.loader)
            given = time.perf_counter()
            controls = self.controls(self.done)
            ready = time.perf_counter()
            self.state, metrics = self.program(self.state, batch, controls)
            sent = time.perf_counter()
            waiting += given - asked
            host += (ready if self.is_inline else sent) - asked
            if losses:
                losses[-1].block_until_ready()
            losses.append(metrics["loss"])
            self.done += 1
        memory = peak_memory(jax.local_devices()[0])
        return Round.since(start, busy, losses, waiting=waiting, host=host, memory=memory)


class TheirStep:
    """The same step in PyTorch."""

    def __init__(self, config: Config, weights: dict[str, np.ndarray], compiled: bool):
        from sngpt_jax.bench.torch_step import TorchStep  # PyTorch is an extra

        self.batches, self.done = RandomBatches(config), 0
        self.controls = partial(step_controls, config.optim, config.train, elapsed_seconds=0.0)
        self.step = TorchStep(config, weights, compiled)

    def __call__(self, steps: int) -> Round:
        losses = []
        # Placing is not timed, because our batches are placed in the background.
        placed = [self.step.place(self.batches[self.done + i]) for i in range(steps)]
        start, busy = time.perf_counter(), time.process_time()
        for batch in placed:
            controls = self.controls(self.done)
            rates = float(controls.lr_multiplier), float(controls.adam_lr_multiplier)
            losses.append(self.step(batch, *rates))
            self.done += 1
        return Round.since(start, busy, losses)


def check_torch(config: Config) -> None:
    """Raises `UserError` if PyTorch lacks the recipe's model or jax's device."""
    problem, family = "", config.model.family
    if family != "compact":
        problem = f"model.family = {family} is not written in PyTorch; take a compact recipe"
    elif importlib.util.find_spec("torch") is None:
        problem = f"PyTorch is not installed; run: {cli.command('pip', 'install', 'torch')}"
    elif config.optim.grad_clip_scope != "global":
        problem = "set optim.grad_clip_scope to global, which on one device is the same"
    else:
        import torch  # an extra

        theirs, ours = "cuda" if torch.cuda.is_available() else "cpu", current_device().platform
        if theirs != ours:
            problem = f"PyTorch runs on {theirs} and jax on {ours}; install both for one device"
    if problem:
        raise UserError(f"--against torch: {problem}")


def first_losses(config: Config, mesh: Mesh) -> dict[str, tuple[float, ...]]:
    """The losses of the first steps here and in PyTorch, in float32 with short batches.

    Raises `UserError` if they differ.
    """
    seq_len = config.data.seq_len
    tokens = min(CHECKED_ROWS, config.train.device_batch_tokens // seq_len) * seq_len
    short = replace(
        config,
        model=replace(config.model, compute_dtype="float32"),
        optim=replace(config.optim, newton_schulz_dtype="float32"),
        data=replace(config.data, batch_tokens=2 * tokens),
        train=replace(config.train, device_batch_tokens=tokens),
    )
    with jax.default_matmul_precision("highest"):
        ours = OurStep(short, mesh)
        with closing(ours.loader):
            losses = {"jax": ours(FIRST_STEPS).losses}
    losses["torch"] = TheirStep(short, ours.weights, compiled=False)(FIRST_STEPS).losses
    # `not <=`, so that NaN counts as a difference
    if not np.abs(np.subtract(losses["jax"], losses["torch"])).max() <= LARGEST_DIFFERENCE:
        said = {name: ", ".join(f"{x:.4f}" for x in found) for name, found in losses.items()}
        raise UserError(
            f"torch_model.py is not the same model: its first losses are {said['torch']},"
            f" jax's {said['jax']}"
        )
    return losses


def speeds(rounds: Sequence[Round], tokens: int) -> dict[str, float]:
    """Tokens per second over the rounds of `tokens` tokens, and the number of busy CPU cores."""
    low, middle, high = harness.quartiles(tokens / r.seconds for r in rounds)
    busy = harness.quartiles(r.busy / r.seconds for r in rounds)[1]
    return {"tok_per_s": middle, "tok_per_s_low": low, "tok_per_s_high": high, "busy_cores": busy}


def measure(arguments: StepArguments, say: harness.Say) -> dict[str, Any]:
    """The speeds of the recipe's step, with the share of the host and the memory of ours."""
    config, against = arguments.overrides, arguments.against == "torch"
    keep_working_memory()
    if against:
        check_torch(config)
    use_compilation_cache(config.train.compilation_cache)
    mesh, losses = make_mesh(fsdp=config.train.fsdp), {}
    if against:
        mesh = make_mesh(jax.devices()[:1])
    config = fitting.resolved(Shapes.of(config, mesh), arguments.kernels).config
    tokens = config.data.batch_tokens // mesh.devices.size
    trust.settle(config, min(config.train.device_batch_tokens, tokens), arguments.kernels)
    if against:
        optim = replace(config.optim, ema_decay=0.0, swa_every=0, qat_below=0.0)
        config = replace(config, optim=optim, eval=replace(config.eval, weights="final"))
        losses = first_losses(config, mesh)
    ours = OurStep(config, mesh)
    steps: dict[str, Callable[[int], Round]] = {"jax": ours}
    if against:
        steps["torch eager"] = TheirStep(config, ours.weights, False)
        steps["torch.compile"] = TheirStep(config, ours.weights, True)
    with closing(ours.loader):
        for step in steps.values():
            step(1)  # compiles
        works = {name: partial(step, arguments.steps) for name, step in steps.items()}
        found = harness.in_turn(works, arguments.rounds)

    tokens, own = config.data.batch_tokens, found["jax"]
    rows = {name: speeds(rounds, arguments.steps * tokens) for name, rounds in found.items()}
    speed, total = rows["jax"]["tok_per_s"], sum(r.seconds for r in own)
    result: dict[str, Any] = harness.environment() | {"devices": mesh.devices.size}
    peak = peak_flops(result["device"])
    model_flops = speed * 3 * forward_flops_per_token(config)
    result |= {
        "first_losses": losses,
        "speed": rows,
        "jax_to": {name: speed / row["tok_per_s"] for name, row in rows.items() if name != "jax"},
        "step_ms": 1e3 * tokens / speed,
        "model_flops_per_s": model_flops,
        "mfu": model_flops / (peak * mesh.devices.size) if peak else None,
        "host_share": sum(r.host for r in own) / total,
        "input_wait_share": sum(r.waiting for r in own) / total,
        "peak_memory": {"first_round": own[0].memory, "last_round": own[-1].memory},
    }
    report(result, config, say)
    return result


def report(result: dict[str, Any], config: Config, say: harness.Say) -> None:
    """Says the lines for a person."""
    cores = f" of {result['cores']} cores" if result["platform"] == "cpu" else ""
    say(
        f"{result['devices']} x {result['device']}{cores}, {compute_dtype(config.model).name};"
        f" {config.data.batch_tokens:,} tokens per step, at most"
        f" {config.train.device_batch_tokens:,} per microbatch and device"
    )
    for name, row in result["speed"].items():
        spread = f"{row['tok_per_s_low']:,.0f} to {row['tok_per_s_high']:,.0f}"
        ratio = result["jax_to"].get(name)
        faster = f"; jax is {ratio:.2f} x as fast" if ratio else ""
        speed = f"{row['tok_per_s']:>12,.0f} tok/s ({spread})"
        say(f"{name:14}{speed}, {row['busy_cores']:.2f} busy cores{faster}")
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] is not None else ""
    first, last = (memory / 1e9 for memory in result["peak_memory"].values())
    say(
        f"jax: {result['step_ms']:,.1f} ms per step,"
        f" {result['model_flops_per_s'] / 1e9:,.1f} GFLOP/s of the model{mfu}\n"
        f"jax: the host takes {result['host_share']:.2%} of the time, with"
        f" {result['input_wait_share']:.2%} of waiting for batches\n"
        f"jax: peak memory {first:.3f} GB after the first round, {last:.3f} GB after the last"
    )
    if result["jax_to"]:
        losses = ", ".join(f"{loss:.4f}" for loss in result["first_losses"]["jax"])
        say(f"the models agree: first losses {losses}, within {LARGEST_DIFFERENCE:g}")
