"""The whole study of a model, and the page that shows it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax.sharding import Mesh
from sngpt_kernels.cayley.dictionary import level_range

from sngpt_jax.base import webpage
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, standard_windows
from sngpt_jax.features.study import Slice, study_slice
from sngpt_jax.model.forward import Variables
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.weights.trained_model import TrainedModel

BATCH_TOKENS = 16_384  # most tokens whose selections are on the host at a time


def truncated(
    config: ModelConfig, variables: Variables, num_levels: int
) -> tuple[ModelConfig, Variables]:
    """The model with only the first `num_levels` levels, which depend on no later one."""
    features = 2 ** config.levels[num_levels - 1].n
    blocks = {}
    for i, block in variables["blocks"].items():
        code = {name: x if name == "mean" else x[:features] for name, x in block["code"].items()}
        blocks[i] = block | {"code": code}
    return replace(config, levels=config.levels[:num_levels]), variables | {"blocks": blocks}


def losses_by_level(
    model: TrainedModel, dataset: Dataset, mesh: Mesh, windows: Windows
) -> list[dict[str, Any]]:
    """Loss in nats per token and bits per byte with one level kept, with two, up to all.

    Raises `UserError` if a loss is not finite.
    """
    losses: list[dict[str, Any]] = []
    count, most = len(model.config.model.levels), model.config.eval.device_batch_tokens
    for num_levels in range(1, count + 1):
        cut, variables = truncated(model.config.model, model.variables, num_levels)
        score = Pass(
            variables,
            Fitted(make_eval_step(cut, mesh), mesh, "scoring"),
            dataset.val,
            dataset.tokenizer.token_bytes(),
            mesh,
            windows,
            most,
            progress_reporter(f"loss with {num_levels} of {count} levels"),
            model.config.eval.byte_count,
        ).score()
        if not math.isfinite(score.loss):
            raise UserError(
                f"the loss of step {model.step} with {num_levels} levels is {score.loss}; take an"
                " earlier --step"
            )
        kept = {"levels": num_levels, "active_features": sum(level.k for level in cut.levels)}
        losses.append(kept | {"loss": score.loss, "bpb": score.bpb, "byte_count": score.byte_count})
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
    """The study on the first `tokens` tokens of the validation text (0: all), for `--json`."""
    config = model.config.model
    windows = standard_windows(len(dataset.val), model.config.data.seq_len, tokens)
    losses = losses_by_level(model, dataset, mesh, windows)
    most = min(model.config.eval.device_batch_tokens, BATCH_TOKENS // mesh.devices.size)
    rows = rows_at_a_time(windows, most, mesh.devices.size)
    piece = Slice(dataset.val, windows, rows, mesh, layers, config, model.variables)
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
            piece, dataset.tokenizer, features_per_level=features_per_level, contexts=contexts
        ),
    }


def page(study: dict[str, Any]) -> str:
    """The HTML page of `study`, the object of `--json`."""
    layers = []
    for layer in study["layers"]:
        levels = [level | {"counts": None} for level in layer["levels"]]  # not shown
        layers.append(layer | {"levels": levels})
    title = f"Features of {study['run']}"
    return webpage.render(__package__, "features", title, study | {"layers": layers})
