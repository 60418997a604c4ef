"""How long an export takes, and how small it gets: `python -m sngpt_jax.bench export --config
golf_12l_recycled --sigma 0.14`.

The weights are drawn, so that a model of full size is at hand on any machine; what is timed does
not depend on what they mean.
"""

import functools
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from sngpt_jax.artifact import account as report
from sngpt_jax.artifact import bundle, codecs, fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.packing import pack
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.policy import is_exported, policy_of
from sngpt_jax.artifact.quantize import Quantized, Stored, dequantize
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.config.recipe import Overrides, parse_command
from sngpt_jax.model.forward import abstract_variables

T = TypeVar("T")

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class BenchArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    sigma: float = 0.14  # standard deviation of the drawn matrices and tables
    seed: int = 0  # of the draws
    repeats: int = 5  # of each timing, of which the median counts
    limit: int = 16_000_000  # bytes that artifact and program may take together, for the table
    tune_to_fit: bool = False  # time the policy that `export --tune-to-fit` finds under that limit
    json: Json = ""
    quiet: Quiet = False


def draw(config: Config, sigma: float, seed: int) -> dict[str, np.ndarray]:
    """A model's tensors by name, float32, with matrices and tables from N(0, sigma²); gains and
    their like are ones.
    """
    rng, tensors = np.random.default_rng(seed), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config.model)):
        name = path_name(path)
        if is_exported(leaf.dtype):
            drawn = policy_of(name, leaf.shape, config).group != "control"
            tensors[name] = (
                np.float32(sigma) * rng.standard_normal(leaf.shape, np.float32)
                if drawn
                else np.ones(leaf.shape, np.float32)
            )
    return tensors


def codec_jobs(stored: Mapping[str, Stored], storage: Storage) -> list[Callable[[], bytes]]:
    """The codec's part of an encoding, a call for each stream, the longest first."""
    grids = [tensor for tensor in stored.values() if isinstance(tensor, Quantized)]
    floats = [tensor for tensor in stored.values() if not isinstance(tensor, Quantized)] + [
        grid.scales for grid in grids
    ]
    work: list[tuple[int, Callable[[], bytes]]] = []
    for dtype in (np.float16, np.float32):
        if parts := [part.reshape(-1) for part in floats if part.dtype == dtype]:
            raw = codecs.split_planes(np.concatenate(parts))
            work.append(
                (
                    len(raw),
                    functools.partial(codecs.compress, raw, storage.byte_codec, storage.level),
                )
            )
    for grid in grids:
        if storage.codec == "rans":
            call = functools.partial(codecs.encode_codes, grid.codes, grid.bits, grid.q_min)
        else:
            flat = grid.codes.reshape(-1)
            raw = (
                pack(flat, grid.bits, grid.q_min)
                if storage.packed and grid.bits < 8
                else flat.tobytes()
            )
            call = functools.partial(codecs.compress, raw, storage.codec, storage.level)
        work.append((grid.codes.size, call))
    return [call for _, call in sorted(work, key=lambda job: -job[0])]


def in_threads(jobs: Sequence[Callable[[], bytes]]) -> None:
    """Runs the jobs in as many threads as an export has."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def dequantize_all(tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """All tensors in float32, in their own shapes."""
    return {name: dequantize(tensor) for name, tensor in tensors.items()}


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        BenchArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.bench export",
        description=(
            "Times the export of a model with drawn weights, and prints what its artifact takes."
        ),
    )
    cli.log_to_stderr(arguments.quiet)
    if arguments.repeats < 1 or not arguments.sigma > 0:
        raise UserError("--repeats is 1 or more, --sigma more than 0")
    if arguments.overrides.export.gptq:
        raise UserError(
            "--export.gptq needs a trained model and its text; compare policies with"
            " sngpt_jax.bench policies"
        )
    config, program = arguments.overrides, bundle.build()
    tensors = draw(config, arguments.sigma, arguments.seed)
    if arguments.tune_to_fit:
        config = fit.search(
            tensors, config, about, arguments.limit - len(program.data), tell=logger.info
        )
    storage = fit.storage_of(config.export)
    times: dict[str, list[float]] = {}

    def timed(part: str, work: Callable[..., T], *inputs: Any) -> T:
        start = time.perf_counter()
        result = work(*inputs)
        times.setdefault(part, []).append(time.perf_counter() - start)
        return result

    # all parts in turn, so that a busy moment of the machine does not fall on one alone
    for _ in range(arguments.repeats):
        stored = timed("quantize", quantize_tensors, tensors, config)
        encoded = timed("encode", artifact.encode, about(config), stored, storage)
        timed("codec_alone", in_threads, codec_jobs(stored, storage))
        decoded = timed("decode", artifact.decode, encoded.data)
        back = timed("dequantize", dequantize_all, decoded.tensors)
    ratios = [
        (q + e) / c
        for q, e, c in zip(times["quantize"], times["encode"], times["codec_alone"], strict=True)
    ]
    seconds = {part: statistics.median(found) for part, found in times.items()}
    if any(not np.array_equal(back[name], dequantize(tensor)) for name, tensor in stored.items()):
        raise RuntimeError("what was decoded is not what was encoded")
    lines = report.report(tensors, stored, encoded, config)
    total = len(encoded.data) + len(program.data)
    result: dict[str, Any] = {
        "config": arguments.config,
        "sigma": arguments.sigma,
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "seconds": seconds,
        "ratio_to_codec": statistics.median(ratios),
        "artifact_bytes": len(encoded.data),
        "code_bytes": len(program.data),
        "total_bytes": total,
        "bits_per_weight": report.as_json(lines),
    }
    if arguments.json != "-":
        print(report.format_table(lines))
        print(
            f"\n{result['parameters']:,} parameters by {storage.codec}{' packed' * storage.packed},"
            f" {os.cpu_count()} threads: quantize {seconds['quantize']:.2f} s + encode"
            f" {seconds['encode']:.2f} s, {result['ratio_to_codec']:.2f} x the codec alone"
            f" ({seconds['codec_alone']:.2f} s); decode {seconds['decode']:.2f} s +"
            f" {seconds['dequantize']:.2f} s"
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
