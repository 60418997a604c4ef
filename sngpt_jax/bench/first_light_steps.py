"""The steps of first light: recipes beside plain XLA and PyTorch, and a run trained twice."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sngpt_kernels import dispatch

from sngpt_jax.ahead import programs
from sngpt_jax.bench import harness, step
from sngpt_jax.bench.arguments import StepArguments
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, changed
from sngpt_jax.config.recipe import load
from sngpt_jax.data.prepared import prepared_data
from sngpt_jax.model.layers import compute_dtype
from sngpt_jax.run import checkpoint, environment
from sngpt_jax.run.meter import peak_flops
from sngpt_jax.training.cost import forward_flops_per_token
from sngpt_jax.training.state import Shapes

Result = dict[str, Any]
Keep = Callable[[Result], None]

STEPS, TRACED_STEPS = 20, 3
# The largest difference of a step's loss from that of plain XLA, in nats. Both round to the same
# dtype at other places, which 20 steps carry on.
LOSS_BOUNDS = {"bfloat16": 2e-2, "float32": 1e-3}
XLA_SHARE = 8  # plain XLA holds all scores, so its microbatches are this many times smaller


def attempt(work: Callable[[], Result]) -> Result:
    """The result of `work`, or its failure as "problem", so that the next work still runs."""
    try:
        return work()
    except dispatch.CannotServe as reason:
        return {"cannot_serve": str(reason)}
    except Exception as error:
        return {"problem": programs.first_line(error)}


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(
        [harness.table_head(titles), *(harness.table_row([*map(str, r)]) for r in rows)]
    )


def problems(rows: Sequence[Result]) -> Result:
    """The problems of the rows as one, if there are any."""
    found = [f"{row['title']}: {row['problem']}" for row in rows if row.get("problem")]
    return {"problem": "; ".join(found)} if found else {}


# ----------------------------------------------------------------------------- steps


def one_microbatch(name: str, device: str) -> Config:
    """The recipe with one microbatch per step; on a CPU with two layers and little data."""
    config = load(name)
    data, tokens = config.data, config.train.device_batch_tokens
    if device == "cpu":
        data, tokens = replace(data, seq_len=32), 256
        config = replace(config, model=replace(config.model, num_layers=2, vocab_size=256))
    tokens = min(tokens, data.batch_tokens)
    train = replace(config.train, device_batch_tokens=tokens, fsdp=1)
    return replace(config, data=replace(data, batch_tokens=tokens), train=train)


def in_plain_xla(config: Config) -> Config:
    """The same step without kernels, in smaller microbatches."""
    rows = config.data.batch_tokens // config.data.seq_len
    most = max(1, rows // XLA_SHARE)
    tokens = next(n for n in range(most, 0, -1) if rows % n == 0) * config.data.seq_len
    fields = dict.fromkeys(("attention", "rotary", "stream", "mlp", "code"), "xla")
    return changed(config, model=fields, train={"device_batch_tokens": tokens})


def kernel_seconds(folder: Path) -> dict[str, float]:
    """The seconds of each kernel in a trace; on a CPU, of each of XLA's operations."""
    seconds: Counter[str] = Counter()
    (path,) = folder.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        is_gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if is_gpu and not line.name.startswith("Stream"):
                continue  # sums of the streams' events
            for event in line.events:
                if is_gpu or any(key == "hlo_op" for key, _ in event.stats):
                    seconds[event.name] += event.duration_ns / 1e9
    return dict(seconds.most_common())


def run_steps(config: Config, trace: Path | None) -> Result:
    """`STEPS` steps on random tokens: losses, speed, memory, and kernels if they are traced."""
    start, tokens = time.monotonic(), config.data.batch_tokens
    ours = step.OurStep(config, make_mesh(jax.devices()[:1]))
    with closing(ours.loader):
        first = ours(1)
        compiled = time.monotonic() - start
        rest = ours(STEPS - 1)
        row: Result = {"losses": first.losses + rest.losses, "compile_seconds": round(compiled, 1)}
        if trace:
            shutil.rmtree(trace, ignore_errors=True)
            with jax.profiler.trace(str(trace)):
                ours(TRACED_STEPS)
            row["kernel_seconds"] = kernel_seconds(trace)
    speed, peak = (STEPS - 1) * tokens / rest.seconds, peak_flops(jax.devices()[0].device_kind)
    row |= {"tok_per_s": speed, "peak_memory": rest.memory}
    return row | {"mfu": speed * 3 * forward_flops_per_token(config) / peak if peak else None}


def loss_problem(mine: Result, plain: Result, bound: float) -> str:
    """What is wrong with the losses of both paths, if anything."""
    if not np.isfinite(mine["losses"]).all():
        return "a loss is not finite"
    largest = float(np.abs(np.subtract(mine["losses"], plain["losses"])).max())
    return (
        "" if largest <= bound else f"a loss differs from plain XLA's by {largest:.1e} > {bound:g}"
    )


def compare_steps(name: str, config: Config, out: Path, keep: Keep) -> Result:
    """The steps with the kernels, in plain XLA, and on a GPU with products that have epilogues."""
    result: Result = harness.environment() | {"tokens": config.data.batch_tokens, "paths": {}}
    paths = {
        "kernels": (config, out.with_suffix(".trace")),
        "plain xla": (in_plain_xla(config), None),
    }
    if config.model.family == "compact" and dispatch.current_device().platform == "cuda":
        # the choice without a measurement leaves them out
        products = changed(config, model={"mlp": "pallas_triton"})
        paths["model.mlp = pallas_triton"] = products, None
    cells = []
    for path, (chosen, trace) in paths.items():
        row = attempt(partial(run_steps, chosen, trace)) | {"title": path}
        result["paths"][path] = row
        if "losses" in row:
            mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
            memory, last = f"{row['peak_memory'] / 1e9:.2f} GB", f"{row['losses'][-1]:.4f}"
            cells.append((name, path, f"{row['tok_per_s']:,.0f}", mfu, memory, last))
        titles = ("recipe", "path", "tokens/s", "MFU", "peak memory", f"loss of step {STEPS}")
        result["markdown"] = table(titles, cells)
        if seconds := result["paths"]["kernels"].get("kernel_seconds"):
            total = sum(seconds.values())
            shares = [(f"`{kernel}`", f"{x / total:.1%}") for kernel, x in seconds.items()][:20]
            result["markdown"] += "\n\n" + table(("kernel", "share of the time"), shares)
        keep(result | problems(list(result["paths"].values())))
    rows, plain = list(result["paths"].values()), result["paths"]["plain xla"]
    for row in rows:
        if "losses" not in row:  # nothing is proven then
            row.setdefault("problem", row.get("cannot_serve"))
        elif row is not plain and "losses" in plain:
            bound = LOSS_BOUNDS[compute_dtype(config.model).name]
            row["problem"] = loss_problem(row, plain, bound)
    return result | problems(rows)


def against_torch(name: str, config: Config) -> Result:
    """The same model in PyTorch, eager and compiled, in turn with ours."""
    if importlib.util.find_spec("torch") is None:
        return {"skipped": "PyTorch is not installed"}
    optim = replace(config.optim, grad_clip_scope="global")
    chosen = replace(config, optim=optim)
    arguments = StepArguments(name, chosen, against="torch", rounds=3, steps=4)
    result = step.measure(arguments, print)
    rows = [
        (name, f"{row['tok_per_s']:,.0f}", f"{result['jax_to'].get(name, 1):.2f}")
        for name, row in result["speed"].items()
    ]
    return result | {"markdown": table(("program", "tokens/s", "jax is as fast, times"), rows)}


# ----------------------------------------------------------------------------- training


def training_overrides(device: str, data: str) -> dict[str, Any]:
    """The options of the short run, by section and field."""
    options = {
        "data.dir": data,
        "data.max_tokens": 500_000,
        "train.steps": 20,
        "train.checkpoint_every": 10,
        "train.deterministic": True,
        "eval.every": 10,
        "eval.tokens": 8192,
        "eval.sample_tokens": 0,
    }
    if device == "cpu":
        options |= {"model.num_layers": 1, "model.vocab_size": 640, "data.max_tokens": 20_000}
        options |= {"data.batch_tokens": 512, "data.seq_len": 32, "train.device_batch_tokens": 512}
        options |= {"eval.tokens": 1024, "eval.device_batch_tokens": 1024}
    return options


def losses(directory: Path) -> list[Any]:
    """The step and the losses of every record of a run."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("step", "train_loss", "val_loss")
    return [[json.loads(line).get(name) for name in names] for line in lines]


def final_state(directory: Path) -> list[Any]:
    """The arrays of the last checkpoint."""
    shapes = Shapes.of(load(str(directory / "config.json")), make_mesh())
    restored = checkpoint.restore(directory / "checkpoints", shapes.state)
    return [
        np.asarray(
            jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for x in jax.tree.leaves(restored.state if restored else ())
    ]


def train_twice(folder: Path, options: dict[str, Any], keep: Keep) -> Result:
    """Trains in two processes, takes the second run's end away and resumes it."""
    shutil.rmtree(folder, ignore_errors=True)
    sections: dict[str, dict[str, Any]] = {}
    for option, value in options.items():
        section, _, name = option.partition(".")
        sections.setdefault(section, {})[name] = value
    prepared_data(changed(load("quickstart"), **sections))

    def train(name: str, **more: str) -> Path:
        command = [sys.executable, "-m", "sngpt_jax.train", "--config", "quickstart", "--quiet"]
        for option, value in {**options, **more}.items():
            flag = f"--{option.replace('_', '-')}"
            command += [flag, str(value)]
        subprocess.run([*command, "--run-dir", str(folder / name)], check=True)
        return folder / name

    result: Result = {}
    first = train("first", **{"train.profile_steps": "12:14"})
    result["kernel_seconds"] = kernel_seconds(first / "profile")
    keep(result)
    expected = losses(first), final_state(first)

    def differs(run: Path) -> bool:
        """Whether the losses or a bit of the last state are others than the first run's."""
        mine = losses(run), final_state(run)
        pairs = zip(mine[1], expected[1], strict=True)
        return mine[0] != expected[0] or not all(np.array_equal(*pair) for pair in pairs)

    second = train("second")
    traced = "" if result["kernel_seconds"] else "holds no kernel"
    rows = [{"title": "the trace", "problem": traced}]
    rows.append({"title": "the second run", "problem": "is another" * differs(second)})
    keep(result | problems(rows))
    # What a kill after step 10 leaves: no summary, and no later checkpoint.
    (second / "summary.json").unlink()
    for path in (second / "checkpoints").glob("*20*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train("second")
    starts = [start["step"] for start in environment.read(second)]
    problem = "is another" if differs(second) else "" if starts == [0, 10] else f"began at {starts}"
    rows.append({"title": "the resumed run", "problem": problem})
    return result | {"steps": len(expected[0]), "state_arrays": len(expected[1])} | problems(rows)
