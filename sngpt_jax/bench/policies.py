"""Export policies side by side on one trained model: `python -m sngpt_jax.bench policies --run
runs/quickstart`.

The four published policies, each with its own codec; variations that keep one thing the same; and
SDClip, plain and by GPTQ.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from sngpt_jax.artifact import fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.account import entropy_of, relative_error
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Quantized, dequantize
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, ExportConfig
from sngpt_jax.config.checks import validate
from sngpt_jax.config.options import Json, OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.config.recipe import load
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.weights.quantized_model import calibrate, host_tensors
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import to_variables

PUBLISHED = {
    "#333": "golf_11l_xsa4",
    "#465": "golf_10l_int5mlp",
    "#1573": "golf_12l_recycled",
    "#740": "golf_9l_xsa_ngram",
}


@dataclass(frozen=True)
class CompareArguments:
    run: Path  # run directory of a trained model
    data: OptionalPath = None  # folder with prepared shards; default: the run's
    step: OptionalInt = None  # checkpoint; default: the latest
    weights: WeightsOption = None
    passthrough_size: int = 65_536  # of all policies; the published one is for models of width 512
    gptq_tokens: int = 131_072  # training tokens that GPTQ takes its second moments over
    tokens: int = 0  # validation tokens to score, from the start of the stream; 0: all
    json: Json = ""
    quiet: Quiet = False


def policies(passthrough_size: int, gptq_tokens: int) -> dict[str, ExportConfig]:
    """The policies by what a person calls them."""
    common = ExportConfig(passthrough_size=passthrough_size, control_dtype="float16")
    published = {
        name: replace(load(recipe).export, passthrough_size=passthrough_size)
        for name, recipe in PUBLISHED.items()
    }
    fewer = published["#1573"]
    int6 = replace(common, mlp_bits=6, attention_bits=6)
    sd = replace(int6, clip="sd")
    return published | {
        "#1573, one byte per code": replace(fewer, packed=False),
        "#1573, rANS": replace(fewer, packed=False, codec="rans", codec_level=22),
        "#1573, rANS, no floor": replace(
            fewer, packed=False, codec="rans", codec_level=22, clip_floor=0.0
        ),
        "int5 row max, rANS": replace(common, mlp_bits=5, attention_bits=5),
        "int6 row max, rANS": int6,
        "int8 row max, rANS": common,
        "int6 SDClip k=12.85, zstd": replace(sd, codec="zstd"),
        "int6 SDClip k=12.85, rANS": sd,
        "int6 SDClip k=12.85, GPTQ, rANS": replace(sd, gptq=True, gptq_tokens=gptq_tokens),
    }


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(
        CompareArguments,
        args=cli.expand_json(argv),
        prog="python -m sngpt_jax.bench policies",
        description=(
            "Exports one model by several policies: bits a weight, error, bytes and bits a byte of"
            " each."
        ),
    )
    if arguments.tokens < 0 or arguments.passthrough_size < 0:
        raise UserError("--tokens and --passthrough-size are 0 or more")
    cli.log_to_stderr(arguments.quiet)
    mesh = make_mesh()
    model = load_model(arguments.run, mesh, arguments.step, arguments.weights)
    dataset = model.open_data(arguments.data)
    tensors = host_tensors(model.variables)
    score = functools.partial(
        score_validation, dataset=dataset, mesh=mesh, max_tokens=arguments.tokens
    )
    before = score(model.config, model.variables, progress=progress_reporter("score"))

    def row(name: str, export: ExportConfig) -> dict[str, Any]:
        config: Config = validate(replace(model.config, export=export))
        moments = calibrate(model.variables, config, dataset, mesh, progress_reporter("calibrate"))
        stored = quantize_tensors(tensors, config, moments)
        encoded = artifact.encode({}, stored, fit.storage_of(export))
        codes = [tensor for tensor in stored.values() if isinstance(tensor, Quantized)]
        count = sum(tensor.codes.size for tensor in codes)
        if not count:
            raise UserError(
                f"{name}: no tensor has more than --passthrough-size ="
                f" {arguments.passthrough_size:,} weights; scale it with the square of the width,"
                " which is 512 there"
            )
        names = [name for name, tensor in stored.items() if isinstance(tensor, Quantized)]
        variables = to_variables(
            {name: dequantize(tensor) for name, tensor in stored.items()}, config, mesh
        )
        after = score(config, variables, progress=progress_reporter(name))
        return {
            "policy": name,
            "entropy": sum(map(entropy_of, codes)) / count,
            "coded": 8 * sum(encoded.tensor_bytes[name] for name in names) / count,
            "error": relative_error({name: tensors[name] for name in names}, stored),
            "bytes": len(encoded.data),
            "bpb": after.bpb,
            "gap": after.bpb - before.bpb,
        }

    rows = []
    if arguments.json != "-":
        print(
            f"{arguments.run}, step {model.step}, {model.weights} weights: {before.bpb:.4f}"
            " bits/byte before\n"
        )
        print(
            "| policy | entropy | coded | rel. MSE | bytes | bits/byte | gap"
            " |\n|---|---|---|---|---|---|---|"
        )
    for name, export in policies(arguments.passthrough_size, arguments.gptq_tokens).items():
        rows.append(r := row(name, export))
        if arguments.json != "-":
            print(
                f"| {name} | {r['entropy']:.3f} | {r['coded']:.3f} | {r['error']:.2e} |"
                f" {r['bytes']:,} | {r['bpb']:.4f} | {r['gap']:+.4f} |",
                flush=True,
            )
    result = {
        "run": str(arguments.run),
        "step": model.step,
        "weights": model.weights,
        "before": asdict(before),
        "rows": rows,
    }
    cli.write_json(result, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
