"""The time of an export and the size of its artifact.

`python -m sngpt_jax.bench export --config golf_12l_recycled --sigma 0.14`. The weights are drawn,
so that every machine has a model of full size. The times do not depend on their meaning.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from sngpt_jax.artifact import account, bundle, codecs, fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.packing import pack
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.policy import is_exported, policy_of
from sngpt_jax.artifact.quantize import Quantized, Stored, dequantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import harness
from sngpt_jax.bench.arguments import ExportArguments
from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config
from sngpt_jax.model.forward import abstract_variables

logger = logging.getLogger("sngpt_jax")


def draw(config: Config, sigma: float, seed: int) -> dict[str, np.ndarray]:
    """A model's tensors by name, float32: matrices and tables from N(0, sigma²), ones elsewhere."""
    rng, tensors = np.random.default_rng(seed), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config.model)):
        name = path_name(path)
        if is_exported(leaf.dtype):
            if policy_of(name, leaf.shape, config).group == "control":
                tensors[name] = np.ones(leaf.shape, np.float32)
            else:
                tensors[name] = np.float32(sigma) * rng.standard_normal(leaf.shape, np.float32)
    return tensors


def codec_jobs(stored: Mapping[str, Stored], storage: Storage) -> list[Callable[[], bytes]]:
    """The codec's part of an encoding: one call per stream, the longest first."""
    grids = [tensor for tensor in stored.values() if isinstance(tensor, Quantized)]
    floats = [tensor for tensor in stored.values() if not isinstance(tensor, Quantized)]
    floats += [grid.scales for grid in grids]
    compress = functools.partial(functools.partial, codecs.compress)
    work: list[tuple[int, Callable[[], bytes]]] = []
    for dtype in (np.float16, np.float32):
        if parts := [part.reshape(-1) for part in floats if part.dtype == dtype]:
            raw = codecs.split_planes(np.concatenate(parts))
            work.append((len(raw), compress(raw, storage.byte_codec, storage.level)))
    for grid in grids:
        if storage.codec == "rans":
            call = functools.partial(codecs.encode_codes, grid.codes, grid.bits, grid.q_min)
        else:
            flat, is_packed = grid.codes.reshape(-1), storage.packed and grid.bits < 8
            raw = pack(flat, grid.bits, grid.q_min) if is_packed else flat.tobytes()
            call = compress(raw, storage.codec, storage.level)
        work.append((grid.codes.size, call))
    return [call for _, call in sorted(work, key=lambda job: -job[0])]


def in_threads(jobs: Sequence[Callable[[], bytes]]) -> None:
    """Runs the jobs in as many threads as an export has."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


class Export:
    """The parts of an export of `tensors`, each of which keeps its result for the next."""

    def __init__(self, tensors: Mapping[str, np.ndarray], config: Config):
        self.tensors, self.config, self.storage = tensors, config, fit.storage_of(config.export)

    def quantize(self) -> None:
        self.stored = quantize_tensors(self.tensors, self.config)

    def encode(self) -> None:
        self.encoded = artifact.encode(about(self.config), self.stored, self.storage)

    def codec_alone(self) -> float:
        """Its own seconds: the inputs of the codec are made before the clock starts."""
        jobs = codec_jobs(self.stored, self.storage)
        return harness.seconds_of(lambda: in_threads(jobs))()

    def decode(self) -> None:
        self.decoded = artifact.decode(self.encoded.data)

    def dequantize(self) -> None:
        self.back = {name: dequantize(tensor) for name, tensor in self.decoded.tensors.items()}


def measure(arguments: ExportArguments, say: harness.Say) -> dict[str, Any]:
    """The times of an export's parts, and the bytes of its artifact and program."""
    if arguments.repeats < 1 or not arguments.sigma > 0:
        raise UserError("--repeats must be 1 or more, --sigma more than 0")
    if arguments.overrides.export.gptq:
        raise UserError(
            "--export.gptq needs a trained model and its text; compare policies with"
            " sngpt_jax.bench policies"
        )
    config, program = arguments.overrides, bundle.build()
    tensors = draw(config, arguments.sigma, arguments.seed)
    if arguments.tune_to_fit:
        room = arguments.limit - len(program.data)
        config = fit.search(tensors, config, about, room, tell=logger.info)
    export = Export(tensors, config)
    parts = {
        "quantize": harness.seconds_of(export.quantize),
        "encode": harness.seconds_of(export.encode),
        "codec_alone": export.codec_alone,
        "decode": harness.seconds_of(export.decode),
        "dequantize": harness.seconds_of(export.dequantize),
    }
    times = harness.in_turn(parts, arguments.repeats)
    for name, tensor in export.stored.items():
        if not np.array_equal(export.back[name], dequantize(tensor)):
            raise RuntimeError(f"{name}: the decoded tensor differs from the encoded one")
    totals = zip(times["quantize"], times["encode"], times["codec_alone"], strict=True)
    ratio = harness.quartiles((q + e) / codec for q, e, codec in totals)[1]
    seconds = harness.medians(times)
    lines = account.report(tensors, export.stored, export.encoded, config)
    sizes = len(export.encoded.data), len(program.data)
    parameters, total = sum(tensor.size for tensor in tensors.values()), sum(sizes)
    say(account.format_table(lines))
    said = ", ".join(f"{part.replace('_', ' ')} {seconds[part]:.2f} s" for part in parts)
    storage = export.storage
    say(
        f"{parameters:,} parameters, {storage.codec}{' packed' * storage.packed},"
        f" {os.cpu_count()} threads: {said}; quantize and encode take {ratio:.2f} x the codec alone"
    )
    verdict = "within" if total <= arguments.limit else "over"
    say(
        f"artifact {sizes[0]:,} + program {sizes[1]:,} = {total:,} bytes,"
        f" {verdict} {arguments.limit:,}"
    )
    return harness.environment() | {
        "config": arguments.config,
        "sigma": arguments.sigma,
        "parameters": parameters,
        "seconds": seconds,
        "ratio_to_codec": ratio,
        "artifact_bytes": sizes[0],
        "code_bytes": sizes[1],
        "total_bytes": total,
        "bits_per_weight": account.as_json(lines),
    }


def about(config: Config) -> dict[str, Any]:
    """Metadata like those of an artifact."""
    return {"config": asdict(config), "tokenizer": None, "step": 0, "weights": "drawn"}
