"""What the features of a run's sparse codes stand for: `python -m sngpt_jax.features --run RUN
--out page.html`.

Over a slice of the validation text: the loss with only the first levels kept, how often each
feature fires, and of some features the strongest contexts, the tokens they fire on, and the
parents and children they fire with; as JSON, and as one HTML page to browse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from jax.sharding import Mesh
from sngpt_kernels.cayley.dictionary import level_range

from sngpt_jax.base import cli, terminal, webpage
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import ModelConfig
from sngpt_jax.config.options import Json, OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import score_stream
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, standard_windows
from sngpt_jax.features.study import Slice, make_selections, study_slice
from sngpt_jax.model.forward import Variables
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import TrainedModel

BATCH_TOKENS = 16_384  # most tokens whose selections are on the host at a time


def truncated(
    config: ModelConfig, variables: Variables, num_levels: int
) -> tuple[ModelConfig, Variables]:
    """The model with only the first `num_levels` levels: no level depends on a later one, so its
    codes are prefixes.
    """
    features = 2 ** config.levels[num_levels - 1][0]
    cut = {
        "mean": slice(None),
        "std": slice(features),
        "bias": slice(features),
        "last_fired": slice(features),
    }
    blocks = {
        i: block | {"code": {name: value[cut[name]] for name, value in block["code"].items()}}
        for i, block in variables["blocks"].items()
    }
    return replace(config, levels=config.levels[:num_levels]), variables | {"blocks": blocks}


def losses_by_level(
    model: TrainedModel, dataset: Dataset, mesh: Mesh, windows: Windows
) -> list[dict[str, Any]]:
    """Loss in nats a token and bits per byte of the validation text with one level kept, with two,
    … with all.

    Raises `UserError` where one is not finite.
    """
    losses = []
    for num_levels in range(1, len(model.config.model.levels) + 1):
        cut, variables = truncated(model.config.model, model.variables, num_levels)
        score = score_stream(
            variables,
            make_eval_step(cut, mesh),
            dataset.val,
            dataset.tokenizer.token_bytes(),
            mesh,
            windows,
            device_batch_tokens=model.config.eval.device_batch_tokens,
            progress=progress_reporter(
                f"loss with {num_levels} of {len(model.config.model.levels)} levels"
            ),
        )
        if not math.isfinite(score.loss):
            raise UserError(
                f"the loss of step {model.step} with {num_levels} levels is {score.loss}; take an"
                " earlier --step"
            )
        active = sum(k for _, k, _ in cut.levels)
        losses.append(
            {"levels": num_levels, "active_features": active, "loss": score.loss, "bpb": score.bpb}
        )
    return losses


def page(study: dict[str, Any]) -> str:
    """The HTML text of a page of `study`, the object that `--json` prints; it needs nothing else."""
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


# ---------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class FeaturesArguments:
    run: Path  # run directory of a trained model with a sparse code (model.levels)
    out: Path  # the HTML page to write; opens in any browser
    json: Json = ""
    quiet: Quiet = False
    data: OptionalPath = None  # folder with prepared validation shards; default: the run's
    step: OptionalInt = None  # checkpoint to study; default: the latest
    weights: WeightsOption = None
    tokens: int = 65_536  # read so many tokens from the start of the stream; 0: all
    layers: str = "all"  # layers whose features are studied, such as 0,3,11
    # of each level of each layer, half of them those that fire most; with their closest relatives
    features: int = 32
    contexts: int = 8  # strongest contexts of each feature


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `--layers` names, ascending. Raises `UserError` for any other text."""
    if text == "all":
        return tuple(range(num_layers))
    names = text.split(",")
    if not all(name.isdecimal() and int(name) < num_layers for name in names):
        raise UserError(
            f"--layers {text}: expected all, or layers from 0 to {num_layers - 1} with commas"
            " between, such as 0,1"
        )
    return tuple(sorted({int(name) for name in names}))


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(
        FeaturesArguments,
        args=cli.expand_json(argv),
        prog="python -m sngpt_jax.features",
        description=(
            "Studies the features of a run's sparse codes and writes a page to browse them."
        ),
    )
    if arguments.features < 1 or arguments.contexts < 1 or arguments.tokens < 0:
        raise UserError(
            "--features and --contexts must be at least 1; --tokens at least 0, which reads all of"
            " the stream"
        )
    check_writable(arguments.out, "--out")
    if arguments.json not in ("", "-"):
        check_writable(Path(arguments.json), "--json")
        if Path(arguments.json).resolve() == arguments.out.resolve():
            raise UserError(
                f"--json {arguments.json}: is the page itself; give the path of another file"
            )
    cli.log_to_stderr(arguments.quiet)
    mesh = make_mesh()
    model = load_model(arguments.run, mesh, arguments.step, arguments.weights)
    config = model.config.model
    if not config.levels:
        raise UserError(
            f'{arguments.run}: has no sparse code to study (model.levels = ""); give a run of a'
            " recipe with one"
        )
    layers = parse_layers(arguments.layers, config.num_layers)
    dataset = model.open_data(arguments.data)

    windows = standard_windows(len(dataset.val), model.config.data.seq_len, arguments.tokens)
    losses = losses_by_level(model, dataset, mesh, windows)
    most = min(model.config.eval.device_batch_tokens, BATCH_TOKENS // mesh.devices.size)
    rows = rows_at_a_time(windows, most, mesh.devices.size)
    piece = Slice(
        dataset.val, windows, rows, mesh, make_selections(config, mesh, layers), model.variables
    )
    study: dict[str, Any] = {
        "run": str(arguments.run),
        "step": model.step,
        "weights": model.weights,
        "data": str(dataset.directory),
        "tokens": windows.targets,
        "levels": [
            {"n": n, "k": k, "degree": degree, "features": len(level_range(config.levels, level))}
            for level, (n, k, degree) in enumerate(config.levels)
        ],
        "losses": losses,
    } | study_slice(
        config,
        piece,
        dataset.tokenizer,
        layers,
        features_per_level=arguments.features,
        contexts=arguments.contexts,
        progress=progress_reporter,
    )
    webpage.write(arguments.out, page(study))
    if arguments.json != "-":
        shown = [("page", str(arguments.out))]
        for row in losses:
            kept_levels = "level 0" if row["levels"] == 1 else f"levels 0-{row['levels'] - 1}"
            shown.append(
                (
                    f"{kept_levels} kept",
                    f"loss {row['loss']:.4f} nats/token, {row['bpb']:.4f} bits/byte",
                )
            )
        count, names = len(study["features"]), ",".join(map(str, layers))
        shown.append(("features", f"{count:,} of layers {names} over {study['tokens']:,} tokens"))
        terminal.show_result("studied", shown)
    cli.write_json(study, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
