"""The trained model that a command is to work on: `--run D`, with a checkpoint and its weights, or `--artifact F`."""

from pathlib import Path

from jax.sharding import Mesh

from sngpt_jax.cli import UserError
from sngpt_jax.config import Weights
from sngpt_jax.run_directory import load_model
from sngpt_jax.trained_model import TrainedModel, from_artifact


def check_source(run: Path | None, artifact: Path | None, step: int | None, weights: Weights | None) -> None:
    """Raises `UserError` unless exactly one source is named, and for options that an artifact has no choice of."""
    if (run is None) == (artifact is None):
        raise UserError("give either --run, a run directory, or --artifact, an exported model")
    if artifact and (step is not None or weights is not None):
        raise UserError("--step and --weights choose from a run; an artifact holds one set of weights")


def open_model(
    run: Path | None, artifact: Path | None, mesh: Mesh, step: int | None = None, weights: Weights | None = None
) -> TrainedModel:
    """The model of the one source that is given. Raises `UserError`."""
    check_source(run, artifact, step, weights)
    if artifact:
        return from_artifact(artifact, mesh)
    assert run
    return load_model(run, mesh, step, weights)
