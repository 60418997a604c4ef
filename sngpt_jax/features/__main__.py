"""Studies a sparse model's features: `python -m sngpt_jax.features --run RUN --out page.html`.

On a slice of the validation text it measures the loss with the first levels alone and how often
features fire. For some it finds contexts, tokens, parents and children.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.config import changed
from sngpt_jax.config.checks import validate
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import (
    EvalTokensOption,
    Json,
    OptionalInt,
    OptionalPath,
    Quiet,
    WeightsOption,
)


@dataclass(frozen=True)
class FeaturesArguments:
    run: Path  # run directory of a trained model with a sparse code (model.levels)
    out: Path  # HTML page to write; opens in any browser
    json: Json = ""
    quiet: Quiet = False
    data: OptionalPath = None  # folder with prepared validation shards; default: the run's data
    step: OptionalInt = None  # checkpoint to study; default: the latest checkpoint
    weights: WeightsOption = None
    device_batch_tokens: EvalTokensOption = None
    tokens: int = 65_536  # number of tokens to read from the start of the stream; 0: all
    layers: str = "all"  # layers whose features are studied, such as 0,3,11
    # number of features to study per level and layer, besides their closest parents and children
    features: int = 32
    contexts: int = 8  # number of strongest contexts per feature


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `--layers` names, ascending. Raises `UserError` for any other text."""
    if text == "all":
        return tuple(range(num_layers))
    names = text.split(",")
    if not all(name.isdecimal() and int(name) < num_layers for name in names):
        raise UserError(f"--layers {text}: expected all, or layers from 0 to {num_layers - 1}: 0,1")
    return tuple(sorted({int(name) for name in names}))


def main(argv: Sequence[str]) -> int:
    arguments = parse(
        FeaturesArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.features",
        description="Studies the features of a run's sparse codes; writes a page to browse them.",
    )
    if arguments.features < 1 or arguments.contexts < 1 or arguments.tokens < 0:
        raise UserError("--features and --contexts must be at least 1; --tokens at least 0")
    check_writable(arguments.out, "--out")
    cli.check_json(arguments.json)
    if Path(arguments.json).resolve() == arguments.out.resolve():
        raise UserError(f"--json {arguments.json}: is the page itself; give another file")
    cli.log_to_stderr(arguments.quiet)

    from sngpt_jax.cluster.mesh import make_mesh  # jax takes seconds to import; --help needs none
    from sngpt_jax.features.page import page, study
    from sngpt_jax.weights.source import load_model

    mesh = make_mesh()
    model = load_model(arguments.run, mesh, arguments.step, arguments.weights)
    if arguments.device_batch_tokens is not None:
        own = {"device_batch_tokens": arguments.device_batch_tokens}
        model = replace(model, config=validate(changed(model.config, eval=own)))
    config = model.config.model
    if not config.levels:
        raise UserError(f"{arguments.run}: has no sparse code to study (model.levels is empty)")
    layers = parse_layers(arguments.layers, config.num_layers)
    found = {"run": str(arguments.run)} | study(
        model,
        model.open_data(arguments.data),
        mesh,
        layers,
        tokens=arguments.tokens,
        features_per_level=arguments.features,
        contexts=arguments.contexts,
    )
    write_text_atomic(arguments.out, page(found))
    if arguments.json != "-":
        rows = [("page", str(arguments.out))]
        for row in found["losses"]:
            kept = "level 0" if row["levels"] == 1 else f"levels 0-{row['levels'] - 1}"
            scores = f"loss {row['loss']:.4f} nats/token, {row['bpb']:.4f} bits/byte"
            scores += f" ({row['byte_count']})"
            rows.append((f"{kept} kept", scores))
        count, names = len(found["features"]), ",".join(map(str, layers))
        rows.append(("features", f"{count:,} of layers {names} over {found['tokens']:,} tokens"))
        terminal.show_result("studied", rows)
    cli.write_json(found, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
