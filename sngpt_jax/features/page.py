"""The whole study of a model, and the page that shows it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax.sharding import Mesh
from sngpt_kernels.cayley.dictionary import level_range

from sngpt_jax.base import webpage
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, standard_windows
from sngpt_jax.features.study import Slice, make_selections, study_slice
from sngpt_jax.model.forward import Variables
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.weights.trained_model import TrainedModel

BATCH_TOKENS = 16_384  # most tokens whose selections are on the host at a time


def truncated(
    config: ModelConfig, variables: Variables, num_levels: int
) -> tuple[ModelConfig, Variables]:
    """The model with only the first `num_levels` levels. No level depends on a later one, so the
    codes of the result are prefixes.
    """
    features = 2 ** config.levels[num_levels - 1].n
    blocks = {
        i: block
        | {
            "code": {
                name: value if name == "mean" else value[:features]
                for name, value in block["code"].items()
            }
        }
        for i, block in variables["blocks"].items()
    }
    return replace(config, levels=config.levels[:num_levels]), variables | {"blocks": blocks}


def losses_by_level(
    model: TrainedModel, dataset: Dataset, mesh: Mesh, windows: Windows
) -> list[dict[str, Any]]:
    """Loss in nats per token and bits per byte of the validation text with one level kept, with
    two, up to all.

    Raises `UserError` if a loss is not finite.
    """
    losses, count = [], len(model.config.model.levels)
    for num_levels in range(1, count + 1):
        cut, variables = truncated(model.config.model, model.variables, num_levels)
        score = Pass(
            variables,
            make_eval_step(cut, mesh),
            dataset.val,
            dataset.tokenizer.token_bytes(),
            mesh,
            windows,
            model.config.eval.device_batch_tokens,
            progress_reporter(f"loss with {num_levels} of {count} levels"),
        ).score()
        if not math.isfinite(score.loss):
            raise UserError(
                f"the loss of step {model.step} with {num_levels} levels is {score.loss}; take an"
                " earlier --step"
            )
        active = sum(level.k for level in cut.levels)
        losses.append(
            {"levels": num_levels, "active_features": active, "loss": score.loss, "bpb": score.bpb}
        )
    return losses


def study(
    model: TrainedModel,
    dataset: Dataset,
    mesh: Mesh,
    layers: Sequence[int],
    *,
    tokens: int,
    features_per_level: int,
    contexts: int,
) -> dict[str, Any]:
    """The study of a model on the first `tokens` tokens of the validation text (0: all), for the
    command's JSON.
    """
    config = model.config.model
    windows = standard_windows(len(dataset.val), model.config.data.seq_len, tokens)
    losses = losses_by_level(model, dataset, mesh, windows)
    most = min(model.config.eval.device_batch_tokens, BATCH_TOKENS // mesh.devices.size)
    rows = rows_at_a_time(windows, most, mesh.devices.size)
    select = make_selections(config, mesh, layers)
    levels = [
        {"n": n, "k": k, "degree": degree, "features": len(level_range(config.levels, i))}
        for i, (n, k, degree) in enumerate(config.levels)
    ]
    return {
        "step": model.step,
        "weights": model.weights,
        "data": str(dataset.directory),
        "tokens": windows.targets,
        "levels": levels,
        "losses": losses,
        **study_slice(
            config,
            Slice(dataset.val, windows, rows, mesh, select, model.variables),
            dataset.tokenizer,
            layers,
            features_per_level=features_per_level,
            contexts=contexts,
            progress=progress_reporter,
        ),
    }


def page(study: dict[str, Any]) -> str:
    """The HTML text of a page of `study`, the object of `--json`. The page needs no other file."""
    layers = [
        layer
        | {
            "levels": [
                {name: x for name, x in level.items() if name != "counts"}
                for level in layer["levels"]
            ]
        }
        for layer in study["layers"]
    ]
    return webpage.render(
        __package__, "features", f"Features of {study['run']}", study | {"layers": layers}
    )
