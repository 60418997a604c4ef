"""From a model's tensors to what its artifact holds, tensor by tensor, by the recipe's policy."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from sngpt_jax.artifact.gptq import gptq
from sngpt_jax.artifact.policy import FLOAT16, MATRICES, policy_of
from sngpt_jax.artifact.quantize import Stored, prune, quantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config


def quantize_tensors(
    tensors: Mapping[str, np.ndarray],
    config: Config,
    moments: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Stored]:
    """Float32 tensors by path, as `config.export` has them kept; in the order of their names.

    `moments`: the second moments [in, in] of the inputs of the matrices that GPTQ is to round.
    Tensors are worked on in as many threads as there are processors, but for GPTQ. Raises
    `UserError` that names the tensor which cannot be kept.
    """

    def one(name: str) -> Stored:
        try:
            return quantize_tensor(
                name, tensors[name], config, None if moments is None else moments.get(name)
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    # the largest first, so that no thread is left with it
    names = sorted(tensors, key=lambda name: -tensors[name].size)
    # the products of GPTQ take all processors by themselves
    with ThreadPoolExecutor(1 if config.export.gptq else os.cpu_count()) as pool:
        stored = {}
        for name, tensor in zip(names, pool.map(one, names), strict=True):
            stored[name] = tensor
            if progress:
                progress(len(stored), len(names))
    return {name: stored[name] for name in sorted(stored)}


def quantize_tensor(
    name: str, tensor: np.ndarray, config: Config, moment: np.ndarray | None = None
) -> Stored:
    """One tensor, float32, as `config.export` has it kept. Raises `UserError`, which does not name
    the tensor.
    """
    policy, export = policy_of(name, tensor.shape, config), config.export
    if (
        export.prune_fraction
        and policy.group != "control"
        and tensor.size > export.passthrough_size
    ):
        tensor = prune(tensor, export.prune_fraction)
    if not policy.has_grid:
        return _as_floats(tensor, policy.bits)
    nearest = quantize(tensor, policy, export)
    if not export.gptq or policy.group not in MATRICES:
        return nearest
    if moment is None:
        raise UserError("has no second moments of its inputs, which export.gptq rounds by")
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
    if not np.isfinite(kept).all():
        place = np.unravel_index(int(np.argmin(np.isfinite(kept))), kept.shape)
        raise UserError(
            f"{tensor[place]} is no finite {kept.dtype.name}; a tensor's {kept.dtype.name} numbers"
            " must be"
        )
    return kept
