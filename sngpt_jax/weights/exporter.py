"""A trained model exported: the artifact, the program that scores it, and its tokenizer."""

import functools
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sngpt_jax
from sngpt_jax.artifact import account, bundle, fit, sngpt_file
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Stored, dequantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import locked, write_bytes_atomic
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, ExportConfig, Weights, changed
from sngpt_jax.config.checks import validate
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.weights.quantized_model import calibrate, host_tensors
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import TrainedModel, tokenizer_beside

logger = logging.getLogger("sngpt_jax")


def export_run(
    run: Path,
    out: Path,
    export: ExportConfig,
    *,
    data: Path | None = None,
    step: int | None = None,
    weights: Weights | None = None,
    limit: int = 0,
    tune_to_fit: bool = False,
    tokens: int | None = 0,
    device_batch_tokens: int | None = None,
) -> tuple[list[Path], str, dict[str, Any]]:
    """Exports the run in `run` by the policy `export`, or with `tune_to_fit` by the policy of least
    error that fits into `limit` bytes. Writes the artifact `out`, and the other files beside it.
    Returns the files, a table of the groups of tensors, and the figures as plain values.

    `tokens`: number of validation tokens to score before and after the export; 0: all; None: no
    score. `device_batch_tokens` replaces `eval.device_batch_tokens`, which the artifact keeps.
    `step`, `weights` as in `load_model`; `data` as in `TrainedModel.open_data`. Raises
    `UserError`. An artifact over the limit is no error.
    """
    mesh = make_mesh()
    model = load_model(run, mesh, step, weights)
    own = {} if device_batch_tokens is None else {"device_batch_tokens": device_batch_tokens}
    config = validate(changed(replace(model.config, export=export), eval=own))
    variables = model.variables
    dataset = model.open_data(data) if tokens is not None or export.gptq else None
    before = moments = unpacked = None
    if dataset and tokens is not None:
        scoring = Fitted(make_eval_step(config.model, mesh), mesh, "scoring")
        before = score_validation(
            *(config, variables, dataset, mesh, tokens, progress_reporter("score")),
            eval_step=scoring,
        )
        if not math.isfinite(before.loss):
            raise UserError(
                f"{run}: the loss of step {model.step} is {before.loss}; take an earlier --step"
            )
    program, tensors = bundle.build(), host_tensors(variables)
    code_bytes = len(program.data)
    if dataset:
        moments = calibrate(variables, config, dataset, mesh, progress_reporter("calibrate"))
    if tune_to_fit:
        if limit <= code_bytes:
            raise UserError(
                f"--limit {limit:,} is less than the program alone, {code_bytes:,} bytes"
            )
        about = functools.partial(metadata, model)
        config = fit.search(tensors, config, about, limit - code_bytes, logger.info, moments)

    stored = quantize_tensors(tensors, config, moments, progress_reporter("quantize"))
    storage, about_it = fit.storage_of(config.export), metadata(model, config)
    encoded = sngpt_file.encode(about_it, stored, storage, progress_reporter("encode"))
    if storage.packed:  # the cost of packing is the difference to unpacked codes
        bytewise = replace(storage, packed=False)
        unpacked = sngpt_file.encode({}, stored, bytewise, progress_reporter("encode unpacked"))

    files = {out: encoded.data, out.with_suffix(".pyz"): program.data}
    if kept := model.tokenizer_path:
        files[tokenizer_beside(out, kept.suffix)] = kept.read_bytes()
    scored_data = dataset.directory if dataset and before else None
    after = publish(files, stored, scored_data, tokens or 0)
    groups = account.report(tensors, stored, encoded, config, unpacked)
    total = len(encoded.data) + code_bytes
    result = {
        "artifact_bytes": len(encoded.data),
        "code_bytes": code_bytes,
        "total_bytes": total,
        "header_bytes": encoded.header_bytes,
        "codec_levels": encoded.levels,
        "limit": limit,
        "fits": not limit or total <= limit,
        "parameters": sum(group.weights for group in groups),
        "bits_per_weight": account.as_json(groups),
        "policy": asdict(config.export),
        "step": model.step,
        "weights": model.weights,
        "program_files": dict(program.files),
        "libraries": list(program.libraries),
    }
    if before:
        result["score"] = {
            "tokens": before.tokens,
            "byte_count": before.byte_count,
            "bpb_before": before.bpb,
            "bpb_after": after["bpb"],
            "gap": after["bpb"] - before.bpb,
        }
    return list(files), account.format_table(groups), result


def metadata(model: TrainedModel, config: Config) -> dict[str, Any]:
    """The metadata of the model's artifact, exported by `config.export`."""
    kept = model.tokenizer_path
    mark = {"sha256": model.tokenizer_sha256, "suffix": kept.suffix} if kept else None
    return {
        "config": asdict(config),
        "tokenizer": mark,
        "step": model.step,
        "weights": model.weights,
        "version": sngpt_jax.__version__,
    }


def verify(path: Path, stored: Mapping[str, Stored]) -> None:
    """Reads the artifact back. Raises RuntimeError for a tensor that differs in a bit from the one
    in memory, which is a bug.
    """
    found = sngpt_file.read(path).tensors
    differing = sorted(found.keys() ^ stored.keys()) or [
        name
        for name, tensor in stored.items()
        if dequantize(found[name]).tobytes() != dequantize(tensor).tobytes()
    ]
    if differing:
        raise RuntimeError(f"{path}: does not hold what was exported: {', '.join(differing)}")


def publish(
    files: Mapping[Path, bytes], stored: Mapping[str, Stored], data: Path | None, tokens: int
) -> dict[str, Any]:
    """Writes artifact, program and further files, in this order; returns what `bundle.run` does.
    The files stay in a hidden folder until the artifact is verified and the program has run.
    """
    out, program, *_ = files
    hidden = out.with_name(f".export-{out.stem}")
    with locked(hidden, f"--out {out}: another process exports to it; choose another --out"):
        try:
            for path, content in files.items():
                write_bytes_atomic(hidden / path.name, content)
            verify(hidden / out.name, stored)
            progress = progress_reporter("score by the program")
            said = bundle.run(hidden / program.name, hidden / out.name, data, tokens, progress)
            for path in reversed(list(files)):  # the artifact last: where it is, the others are
                if path.is_symlink():  # to what may be another file system
                    write_bytes_atomic(path, files[path])
                else:
                    os.replace(hidden / path.name, path)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return said
