"""Export policies side by side on one trained model.

`python -m sngpt_jax.bench policies --run runs/quickstart`. The policies are the four published
ones, each with its own codec, some variations of them, and SDClip, plain and with GPTQ.
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from sngpt_jax.artifact import fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.account import entropy_of, relative_error
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Quantized, dequantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import harness
from sngpt_jax.bench.arguments import PoliciesArguments
from sngpt_jax.bench.published import FORMS, as_published
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import ExportConfig
from sngpt_jax.config.checks import validate
from sngpt_jax.config.recipe import load
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.weights.quantized_model import calibrate, host_tensors
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import to_variables

COLUMNS = {  # the titles of the table, and how a cell shows a row
    "policy": "{policy}",
    "entropy": "{entropy:.3f}",
    "coded": "{coded:.3f}",
    "relative MSE": "{error:.2e}",
    "bytes": "{bytes:,}",
    "bits per byte": "{bpb:.4f}",
    "gap": "{gap:+.4f}",
}


def policies(passthrough_size: int, gptq_tokens: int) -> dict[str, ExportConfig]:
    """The policies by the names that the table shows."""
    common = ExportConfig(passthrough_size=passthrough_size, control_dtype="float16")
    published = {
        name: as_published(recipe, replace(load(recipe).export, passthrough_size=passthrough_size))
        for recipe, (name, _) in FORMS.items()
    }
    plain = replace(published["#1573"], packed=False)
    rans = replace(plain, codec="rans", codec_level=22)
    int6 = replace(common, mlp_bits=6, attention_bits=6)
    sd = replace(int6, clip="sd")
    return published | {
        "#1573, one byte per code": plain,
        "#1573, rANS": rans,
        "#1573, rANS, no floor": replace(rans, clip_floor=0.0),
        "int5 row max, rANS": replace(common, mlp_bits=5, attention_bits=5),
        "int6 row max, rANS": int6,
        "int8 row max, rANS": common,
        "int6 SDClip k=12.85, zstd": replace(sd, codec="zstd"),
        "int6 SDClip k=12.85, rANS": sd,
        "int6 SDClip k=12.85, GPTQ, rANS": replace(sd, gptq=True, gptq_tokens=gptq_tokens),
    }


def measure(arguments: PoliciesArguments, say: harness.Say) -> dict[str, Any]:
    """The bits per weight, error, bytes and bits per byte of each policy."""
    if arguments.tokens < 0 or arguments.passthrough_size < 0:
        raise UserError("--tokens and --passthrough-size must be 0 or more")
    mesh = make_mesh()
    model = load_model(arguments.run, mesh, arguments.step, arguments.weights)
    dataset = model.open_data(arguments.data)
    tensors = host_tensors(model.variables)
    score = partial(score_validation, dataset=dataset, mesh=mesh, max_tokens=arguments.tokens)
    before = score(model.config, model.variables, progress=progress_reporter("score"))

    def row(name: str, export: ExportConfig) -> dict[str, Any]:
        config = validate(replace(model.config, export=export))
        moments = calibrate(model.variables, config, dataset, mesh, progress_reporter("calibrate"))
        stored = quantize_tensors(tensors, config, moments)
        codes = {name: code for name, code in stored.items() if isinstance(code, Quantized)}
        if not codes:
            raise UserError(
                f"{name}: no tensor has more than --passthrough-size ="
                f" {arguments.passthrough_size:,} weights; the published size is for width 512,"
                " scale it with the square of the width"
            )
        encoded = artifact.encode({}, stored, fit.storage_of(export))
        count = sum(code.codes.size for code in codes.values())
        restored = {name: dequantize(tensor) for name, tensor in stored.items()}
        variables = to_variables(restored, config, mesh)
        after = score(config, variables, progress=progress_reporter(name))
        return {
            "policy": name,
            "entropy": sum(map(entropy_of, codes.values())) / count,
            "coded": 8 * sum(encoded.tensor_bytes[name] for name in codes) / count,
            "error": relative_error({name: tensors[name] for name in codes}, stored),
            "bytes": len(encoded.data),
            "bpb": after.bpb,
            "gap": after.bpb - before.bpb,
        }

    say(
        f"{arguments.run}, step {model.step}, {model.weights} weights: {before.bpb:.4f} bits per"
        " byte before the export\n"
    )
    say(harness.table_head(tuple(COLUMNS)))
    rows = []
    for policy in policies(arguments.passthrough_size, arguments.gptq_tokens).items():
        rows.append(row(*policy))
        say(harness.table_row([cell.format(**rows[-1]) for cell in COLUMNS.values()]))
    return harness.environment() | {
        "run": str(arguments.run),
        "step": model.step,
        "weights": model.weights,
        "before": asdict(before),
        "rows": rows,
    }
