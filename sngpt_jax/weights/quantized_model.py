"""A trained model's tensors as an artifact will hold them. GPTQ takes a pass over training text,
so jax has a part in it.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.policy import is_exported
from sngpt_jax.artifact.quantize import Stored, dequantize
from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.calibration import second_moments, training_stream
from sngpt_jax.model.forward import Variables
from sngpt_jax.weights.trained_model import to_variables

Progress = Callable[[int, int], None]


def host_tensors(variables: Variables) -> dict[str, np.ndarray]:
    """What of a model's variables is exported, by path, as arrays of the host."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves if is_exported(leaf.dtype)}


def calibrate(
    variables: Variables,
    config: Config,
    dataset: Dataset,
    mesh: Mesh,
    progress: Progress | None = None,
) -> Mapping[str, np.ndarray] | None:
    """The second moments of the matrices' inputs over training text, where the policy rounds by
    them; else None.
    """
    if not config.export.gptq:
        return None
    return second_moments(
        config,
        variables,
        training_stream(dataset, config.export.gptq_tokens),
        config.export.gptq_tokens,
        mesh,
        progress,
    )


def quantize_variables(
    variables: Variables,
    config: Config,
    dataset: Dataset,
    mesh: Mesh,
    progress: Progress | None = None,
) -> Variables:
    """`variables` as a model that is read back from an artifact has them."""
    stored: dict[str, Stored] = quantize_tensors(
        host_tensors(variables), config, calibrate(variables, config, dataset, mesh, progress)
    )
    return to_variables({name: dequantize(tensor) for name, tensor in stored.items()}, config, mesh)
