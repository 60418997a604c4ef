"""From a model's tensors to the tensors of its artifact, by the recipe's policy."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from sngpt_jax.artifact.gptq import gptq
from sngpt_jax.artifact.parallel import Progress, in_threads
from sngpt_jax.artifact.policy import FLOAT16, MATRICES, of_tables, policy_of
from sngpt_jax.artifact.quantize import Stored, prune, quantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config


def quantize_tensors(
    tensors: Mapping[str, np.ndarray],
    config: Config,
    moments: Mapping[str, np.ndarray] | None = None,
    progress: Progress | None = None,
) -> dict[str, Stored]:
    """Float32 tensors by path, stored as `config.export` says, sorted by name. `moments`: second
    moments [in, in] of the inputs of the matrices that GPTQ rounds. Raises `UserError` that names a
    tensor which cannot be stored.
    """

    def stored(name: str) -> Stored:
        try:
            return _quantize(name, tensors[name], config, (moments or {}).get(name))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    names = sorted(tensors)
    jobs = [(tensors[name].size, partial(stored, name)) for name in names]
    threads = 1 if config.export.gptq else None  # the products of GPTQ use all processors
    return dict(zip(names, in_threads(jobs, threads, progress), strict=True))


def _quantize(name: str, tensor: np.ndarray, config: Config, moment: np.ndarray | None) -> Stored:
    policy, export = policy_of(name, tensor.shape, config), config.export
    large = policy.group != "control" and tensor.size > export.passthrough_size
    if export.prune_fraction and large:
        tensor = prune(tensor, export.prune_fraction)
    if not policy.has_grid:
        return _as_floats(tensor, policy.bits)
    nearest = quantize(tensor, policy, export if policy.group in MATRICES else of_tables(export))
    if not export.gptq or policy.group not in MATRICES:
        return nearest
    if moment is None:
        raise UserError("export.gptq needs the second moments of its inputs, which are missing")
    codes = gptq(
        tensor.T,
        nearest.scales,
        moment,
        q_min=nearest.q_min,
        q_max=nearest.q_max,
        damping=export.gptq_damping,
        block=export.gptq_block,
    )
    return replace(nearest, codes=codes)


def _as_floats(tensor: np.ndarray, bits: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # an error below
        kept = tensor.astype(np.float16 if bits == FLOAT16 else np.float32)
    finite = np.isfinite(kept)
    if not finite.all():
        raise UserError(
            f"{tensor[~finite][0]} is not a finite {kept.dtype.name}; export an earlier --step"
        )
    return kept
