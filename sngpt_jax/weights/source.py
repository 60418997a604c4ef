"""The trained model that a command works on, from `--run D` or `--artifact F`."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.config import Weights
from sngpt_jax.config import file as config_file
from sngpt_jax.model.forward import join
from sngpt_jax.optim.averaging import SWA, averaged_weights
from sngpt_jax.run import checkpoint
from sngpt_jax.run.directory import checkpoint_dir, read_config, tokenizer_path
from sngpt_jax.training import trust
from sngpt_jax.training.compiler import use_compilation_cache
from sngpt_jax.training.state import Shapes
from sngpt_jax.weights.trained_model import TrainedModel, from_artifact, on_any_device


def open_model(
    run: Path | None,
    artifact: Path | None,
    mesh: Mesh,
    step: int | None = None,
    weights: Weights | None = None,
    kernels: trust.Mode = "check",
) -> TrainedModel:
    """The model of `run` or `artifact`. `kernels` says which custom kernels may run.

    Raises `UserError` unless exactly one of `run` and `artifact` is given, and for a `step` or
    `weights` of an artifact.
    """
    if run and not artifact:
        return load_model(run, mesh, step, weights, kernels)
    if run or not artifact:
        raise UserError("give either --run, a run directory, or --artifact, an exported model")
    if step is not None or weights:
        raise UserError("--step and --weights need --run: an artifact holds one set of weights")
    model = from_artifact(artifact, mesh)
    trust.settle_own(model.config, kernels)
    return model


def load_model(
    run_dir: Path,
    mesh: Mesh,
    step: int | None = None,
    weights: Weights | None = None,
    kernels: trust.Mode = "check",
) -> TrainedModel:
    """The weights of the run in `run_dir` at checkpoint `step`, or at the latest intact one, laid
    out over `mesh`. `weights`: the last step's (final) or an average (swa, ema); None: the run's
    eval.weights. `kernels`: which custom kernels may run. Raises `UserError` if the run keeps no
    such average, or has no snapshot yet.
    """
    config = on_any_device(read_config(run_dir))
    use_compilation_cache(config_file.with_own_cache(config).train.compilation_cache)
    trust.settle_own(config, kernels)
    weights = weights or config.eval.weights
    state = Shapes.of(config, mesh).state
    name = "params" if weights == "final" else weights
    part: dict[str, Any] = {name: getattr(state, name), "statistics": state.statistics}
    if part[name] is None:
        field = {"swa": "optim.swa_every", "ema": "optim.ema_decay"}[weights]
        raise UserError(
            f"--weights {weights}: the run {run_dir} keeps no such average ({field} = 0); take"
            " --weights final"
        )
    restored = checkpoint.restore_parts(checkpoint_dir(run_dir), part, step)
    found = restored.state[name]
    if isinstance(found, SWA) and not int(found.count):
        raise UserError(
            f"--weights swa: no snapshot was taken up to step {restored.step} of {run_dir}; take a"
            " later --step or --weights final"
        )
    params = found if weights == "final" else averaged_weights(found, mesh)
    kept = tokenizer_path(run_dir)
    return TrainedModel(
        config,
        join(params, restored.state["statistics"]),
        restored.step,
        weights,
        run_dir,
        tokenizer_path=kept,
        tokenizer_sha256=file_sha256(kept, UserError) if kept else None,
    )
