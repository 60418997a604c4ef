"""How long an export takes, and how small it gets: `python -m sngpt_jax.export.bench --config golf_12l_recycled --sigma 0.14`.

The weights are drawn, so that a model of full size is at hand on any machine; what is timed does not depend on what they mean.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro

from sngpt_jax import cli
from sngpt_jax.config import Config
from sngpt_jax.export import artifact, bundle, codecs, fit, report
from sngpt_jax.export.artifact import Storage
from sngpt_jax.export.packing import pack
from sngpt_jax.export.pipeline import quantize_tensors
from sngpt_jax.export.quantize import Quantized, Stored, dequantize
from sngpt_jax.parallel import path_name
from sngpt_jax.policy import is_exported, policy_of
from sngpt_jax.recipe import Overrides, parse_command
from sngpt_jax.step import abstract_variables

T = TypeVar("T")


@dataclass(frozen=True)
class BenchArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    sigma: float = 0.14  # standard deviation of the drawn matrices and tables
    seed: int = 0  # of the draws
    limit: int = 16_000_000  # bytes that artifact and program may take together, for the table
    tune_to_fit: bool = False  # time the policy that `export --tune-to-fit` finds under that limit
    json: Annotated[str, tyro.conf.arg(metavar="[PATH]")] = ""  # print one JSON object, or write it to PATH


def draw(config: Config, sigma: float, seed: int) -> dict[str, np.ndarray]:
    """A model's tensors with matrices and tables from N(0, sigma²); gains and their like are ones."""
    import jax

    rng, tensors = np.random.default_rng(seed), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config.model)):
        name = path_name(path)
        if is_exported(leaf.dtype):
            drawn = policy_of(name, leaf.shape, config).group != "control"
            tensors[name] = (
                np.float32(sigma) * rng.standard_normal(leaf.shape, np.float32) if drawn else np.ones(leaf.shape, np.float32)
            )
    return tensors


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def codec_alone(stored: Mapping[str, Stored], storage: Storage) -> float:
    """Seconds that the codec takes for the codes of the same tensors, in as many threads as an export has."""
    grids = sorted((t for t in stored.values() if isinstance(t, Quantized)), key=lambda t: -t.codes.size)
    codec = storage.codec
    if codec == "rans":
        work = [partial(codecs.encode_codes, t.codes, t.bits, t.q_min) for t in grids]
    else:
        raw = [pack(t.codes.reshape(-1), t.bits, t.q_min) if storage.packed else t.codes.tobytes() for t in grids]
        work = [partial(codecs.compress, r, codec, storage.level) for r in raw]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return timed(lambda: list(pool.map(lambda run: run(), work)))[1]


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        BenchArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.export.bench",
        description="Times the export of a model with drawn weights, and prints what its artifact takes.",
    )
    cli.log_to_stderr()
    config, program = arguments.overrides, bundle.build()
    tensors = draw(config, arguments.sigma, arguments.seed)
    if arguments.tune_to_fit:
        config = fit.search(
            tensors, config, about, arguments.limit - len(program.data), tell=lambda line: print(line, flush=True)
        )
    storage = fit.storage_of(config.export)
    stored, quantize_seconds = timed(lambda: quantize_tensors(tensors, config))
    encoded, encode_seconds = timed(lambda: artifact.encode(about(config), stored, storage))
    codec_seconds = codec_alone(stored, storage)
    decoded, decode_seconds = timed(lambda: artifact.decode(encoded.data))
    back, dequantize_seconds = timed(lambda: {name: dequantize(tensor) for name, tensor in decoded.tensors.items()})
    if any(not np.array_equal(back[name], dequantize(tensor)) for name, tensor in stored.items()):
        raise RuntimeError("what was decoded is not what was encoded")
    lines = report.report(tensors, stored, encoded, config)
    total = len(encoded.data) + len(program.data)
    result: dict[str, Any] = {
        "config": arguments.config,
        "sigma": arguments.sigma,
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "seconds": {
            "quantize": quantize_seconds,
            "encode": encode_seconds,
            "codec_alone": codec_seconds,
            "decode": decode_seconds,
            "dequantize": dequantize_seconds,
        },
        "ratio_to_codec": (quantize_seconds + encode_seconds) / codec_seconds,
        "artifact_bytes": len(encoded.data),
        "code_bytes": len(program.data),
        "total_bytes": total,
        "bits_per_weight": report.as_json(lines),
    }
    if arguments.json != "-":
        print(report.format_table(lines))
        print(
            f"\n{result['parameters']:,} parameters by {storage.codec}{' packed' * storage.packed}, {os.cpu_count()} threads:"
            f" quantize {quantize_seconds:.2f} s + encode {encode_seconds:.2f} s = {result['ratio_to_codec']:.2f} x the codec"
            f" alone, {codec_seconds:.2f} s; decode {decode_seconds:.2f} s, to float32 {dequantize_seconds:.2f} s"
        )
        print(
            f"artifact {len(encoded.data):,} + program {len(program.data):,} = {total:,} bytes,"
            f" {'within' if total <= arguments.limit else 'over'} {arguments.limit:,}"
        )
    cli.write_json(result, arguments.json)
    return 0


def about(config: Config) -> dict[str, Any]:
    """Metadata like those of an artifact."""
    return {"config": asdict(config), "tokenizer": None, "step": 0, "weights": "drawn"}


if __name__ == "__main__":
    cli.run(main)
