"""The time of an export and the size of its artifact.

`python -m sngpt_jax.bench export --config golf_12l_recycled --sigma 0.14`. The weights are drawn,
so that every machine has a model of full size. The times do not depend on their meaning.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np

from sngpt_jax.artifact import account, bundle, codecs, fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.packing import pack
from sngpt_jax.artifact.parallel import in_threads
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.policy import is_exported, policy_of
from sngpt_jax.artifact.quantize import Quantized, Stored, dequantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import harness, published
from sngpt_jax.bench.arguments import ExportArguments
from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config
from sngpt_jax.config.recipe import recipe_name
from sngpt_jax.model.forward import abstract_variables


def draw(config: Config, sigma: float) -> dict[str, np.ndarray]:
    """A model's tensors by name, float32: matrices and tables from N(0, sigma²), ones elsewhere."""
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config.model)):
        name = path_name(path)
        if not is_exported(leaf.dtype):
            continue
        if policy_of(name, leaf.shape, config).group == "control":
            tensors[name] = np.ones(leaf.shape, np.float32)
        else:
            tensors[name] = np.float32(sigma) * rng.standard_normal(leaf.shape, np.float32)
    return tensors


def codec_jobs(
    stored: Mapping[str, Stored], storage: Storage
) -> list[tuple[int, Callable[[], bytes]]]:
    """The codec's part of an encoding, for `in_threads`: one call per stream."""
    grids = [tensor for tensor in stored.values() if isinstance(tensor, Quantized)]
    floats = [tensor for tensor in stored.values() if not isinstance(tensor, Quantized)]
    floats += [grid.scales for grid in grids]
    jobs: list[tuple[int, Callable[[], bytes]]] = []
    for dtype in (np.float16, np.float32):
        if parts := [part.reshape(-1) for part in floats if part.dtype == dtype]:
            raw = codecs.split_planes(np.concatenate(parts))
            call = partial(codecs.compress, raw, storage.byte_codec, storage.level)
            jobs.append((len(raw), call))
    shared = defaultdict[tuple[int, int], list[np.ndarray]](list)
    for grid in grids:
        if storage.packed and grid.bits < 8:
            shared[grid.bits, grid.q_min].append(grid.codes.reshape(-1))
        elif storage.codec == "rans":
            call = partial(codecs.encode_codes, grid.codes, grid.bits, grid.q_min)
            jobs.append((grid.codes.size, call))
        else:
            call = partial(codecs.compress, grid.codes.tobytes(), storage.codec, storage.level)
            jobs.append((grid.codes.size, call))
    for (bits, q_min), parts in shared.items():
        codes = np.concatenate(parts)
        call = partial(codecs.compress, pack(codes, bits, q_min), storage.byte_codec, storage.level)
        jobs.append((codes.size, call))
    return jobs


def export_once(
    tensors: Mapping[str, np.ndarray], config: Config
) -> tuple[dict[str, float], dict[str, Stored], artifact.Encoded]:
    """The seconds of each part of an export, and what the export stores.

    Raises RuntimeError if a decoded tensor differs from the encoded one.
    """
    about = {"config": asdict(config), "tokenizer": None, "step": 0, "weights": "drawn"}
    storage, timed, seconds = fit.storage_of(config.export), harness.timed, {}
    stored, seconds["quantize"] = timed(lambda: quantize_tensors(tensors, config))
    encoded, seconds["encode"] = timed(lambda: artifact.encode(about, stored, storage))
    jobs = codec_jobs(stored, storage)
    _, seconds["codec_alone"] = timed(lambda: in_threads(jobs))
    decoded, seconds["decode"] = timed(lambda: artifact.decode(encoded.data).tensors)
    back, seconds["dequantize"] = timed(
        lambda: {name: dequantize(tensor) for name, tensor in decoded.items()}
    )
    for name, tensor in stored.items():
        if not np.array_equal(back[name], dequantize(tensor)):
            raise RuntimeError(f"{name}: the decoded tensor differs from the encoded one")
    return seconds, stored, encoded


def measure(arguments: ExportArguments, say: harness.Say) -> dict[str, Any]:
    """The times of an export's parts, and the bytes of its artifact and program."""
    config = arguments.overrides
    if not arguments.sigma > 0:
        raise UserError("--sigma must be more than 0")
    if config.export.gptq:
        raise UserError("--export.gptq needs a trained model; run sngpt_jax.bench policies")
    recipe = recipe_name(arguments.config)
    if arguments.against_published:
        published.check(recipe)
    program, tensors = len(bundle.build().data), draw(config, arguments.sigma)
    work = {"export": lambda: export_once(tensors, config)}
    rounds = harness.in_turn(work, arguments.repeats)["export"]
    times, (_, stored, encoded) = [seconds for seconds, *_ in rounds], rounds[-1]
    seconds = {part: harness.quartiles(t[part] for t in times)[1] for part in times[0]}
    ratio = harness.quartiles((t["quantize"] + t["encode"]) / t["codec_alone"] for t in times)[1]
    lines = account.report(tensors, stored, encoded, config)
    parameters, size = sum(tensor.size for tensor in tensors.values()), len(encoded.data)
    say(account.format_table(lines))
    said = ", ".join(f"{part.replace('_', ' ')} {taken:.2f} s" for part, taken in seconds.items())
    say(
        f"{parameters:,} parameters, {config.export.codec}{' packed' * config.export.packed},"
        f" {os.cpu_count()} threads: {said}; quantize and encode take {ratio:.2f} x the codec alone"
    )
    say(f"artifact {size:,} + program {program:,} = {size + program:,} bytes")
    beside = None
    if arguments.against_published:
        beside = published.compare(recipe, config, stored, say)
    return harness.environment() | {
        "config": arguments.config,
        "sigma": arguments.sigma,
        "parameters": parameters,
        "seconds": seconds,
        "ratio_to_codec": ratio,
        "artifact_bytes": size,
        "code_bytes": program,
        "total_bytes": size + program,
        "bits_per_weight": account.as_json(lines),
        "against_published": beside,
    }
