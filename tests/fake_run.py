"""Run directories without a training, with curves that a formula gives."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from sngpt_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, to_json


def loss(step: int, seed: int) -> float:
    return 3 + 4 / (1 + step / 10) + 0.1 * math.sin(seed * step)


def records(steps: int, seed: int, every: int, levels: int) -> list[dict[str, Any]]:
    """A training record per step, and every so many a validation with the health of `levels` in
    two layers.
    """
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        value = loss(step, seed)
        if step:
            record = {"step": step, "train_loss": value, "lr": 0.02 * (1 - step / steps)}
            record |= {"grad_norm": 1 / step, "tokens": step * 2048, "elapsed_seconds": step / 10}
            found.append({**record, "step_ms": 100.0, "tok_per_s": 20480.0})
        if step % every == 0:
            scores = {"val_loss": value, "val_bpb": value / 2, "val_seconds": 0.5}
            found.append({"step": step, **scores})
        if step % every == 0 and levels:
            code = {
                f"code/{layer}level{level}/{name}": 1 / (1 + step)
                for layer in ("", "layer00/", "layer01/")
                for level in range(levels)
                for name in ("dead", "mu_mean")
            }
            code |= {"code/cos": 0.5, "code/layer00/cos": 0.4}
            found.append({"step": step, "code/tokens": 64, **code})
    return found


def make(
    directory: Path,
    *,
    seed: int = 1,
    steps: int = 40,
    every: int = 10,
    levels: int = 0,
    finished: bool = True,
    model: ModelConfig | None = None,
    data: str | None = "0123456789ab",
) -> Path:
    """A run directory of that many steps; returns it."""
    directory.mkdir(parents=True)
    optim, train = OptimConfig(warmdown_fraction=0.5), TrainConfig(steps=steps, seed=seed)
    config = Config(model=model or ModelConfig(), optim=optim, train=train)
    (directory / "config.json").write_text(to_json(config))
    lines = records(steps, seed, every, levels)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    if finished:
        value = loss(steps, seed)
        summary = {"steps": steps, "tokens": steps * 2048, "parameters": 1000, "swa_val_bpb": None}
        summary |= {"val_loss": value, "val_bpb": value / 2, "best_val_loss": value}
        summary |= {"val_tokens": 4096, "val_data": "text", "val_hash": data}
        summary |= {"train_seconds": steps / 10, "tok_per_s": 20480.0}
        (directory / "summary.json").write_text(json.dumps(summary))
    start = {"step": 0, "time": "2026-01-01T00:00:00+00:00", "jax": "0.10.2"}
    start["commit"] = "0123456789abcdef0123+changes"
    (directory / "environment.jsonl").write_text(json.dumps(start) + "\n")
    return directory


def with_model(**fields: Any) -> ModelConfig:
    return dataclasses.replace(ModelConfig(), **fields)
