"""A trained model's tensors as its artifact will hold them."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.artifact.parallel import Progress
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.policy import is_exported
from sngpt_jax.artifact.quantize import dequantize
from sngpt_jax.cluster.mesh import leaves_by_path
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.calibration import second_moments, training_stream
from sngpt_jax.model.forward import Variables
from sngpt_jax.weights.trained_model import to_variables


def host_tensors(variables: Variables) -> dict[str, np.ndarray]:
    """The exported variables of a model by path, as arrays on the host."""
    leaves: dict[str, jax.Array] = leaves_by_path(variables)
    return {name: np.asarray(leaf) for name, leaf in leaves.items() if is_exported(leaf.dtype)}


def calibrate(
    variables: Variables,
    config: Config,
    dataset: Dataset,
    mesh: Mesh,
    progress: Progress | None = None,
) -> Mapping[str, np.ndarray] | None:
    """The second moments of the matrices' inputs over training text, if the policy uses GPTQ."""
    if not config.export.gptq:
        return None
    tokens = config.export.gptq_tokens
    stream = training_stream(dataset, tokens)
    return second_moments(config, variables, stream, tokens, mesh, progress)


def quantize_variables(
    variables: Variables,
    config: Config,
    dataset: Dataset,
    mesh: Mesh,
    progress: Progress | None = None,
) -> Variables:
    """`variables` as a model read from an artifact has them."""
    moments = calibrate(variables, config, dataset, mesh, progress)
    stored = quantize_tensors(host_tensors(variables), config, moments)
    return to_variables({name: dequantize(tensor) for name, tensor in stored.items()}, config, mesh)
