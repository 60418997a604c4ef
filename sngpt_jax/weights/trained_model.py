"""A trained model in memory, and how one is read back from an exported artifact; `run_directory`
reads them from runs.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.artifact import file as artifact
from sngpt_jax.artifact.header import ArtifactError
from sngpt_jax.artifact.policy import is_exported
from sngpt_jax.artifact.quantize import dequantize
from sngpt_jax.cluster.mesh import path_name, state_shardings
from sngpt_jax.config import Config, ConfigError, Weights
from sngpt_jax.config import file as config_file
from sngpt_jax.data.shards import Dataset, open_dataset
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.model.forward import Variables, abstract_variables

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class TrainedModel:
    """A model read back: its configuration, its variables on the mesh, and where they are from."""

    config: Config
    variables: Variables  # parameters, with the statistics of sparse codes in their places
    step: int  # of the run
    weights: str  # which ones they are: final, swa or ema
    source: Path  # a run directory or an artifact
    tokenizer_path: Path | None = None  # the copy that is kept with the source, where one is
    tokenizer_sha256: str | None = None  # None where nothing is known of it

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `ConfigError` where none is kept, or another one than the
        model's.
        """
        if self.tokenizer_path is None:
            raise ConfigError(f"{self.source}: keeps no tokenizer; {self._remedy()}")
        tokenizer = load_tokenizer(self.tokenizer_path)
        if self.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise ConfigError(
                f"{self.tokenizer_path}: not the tokenizer of {self.source}; {self._remedy()}"
            )
        return tokenizer

    def _remedy(self) -> str:
        if self.source.is_dir():
            return "import its weights with --tokenizer into another --run-dir"
        return (
            "put the one that export wrote beside it,"
            f" {tokenizer_beside(self.source, '.model').stem}.*, back there"
        )

    def open_data(self, directory: Path | None = None) -> Dataset:
        """The prepared data in `directory`, by default the recipe's. Raises `UserError` where
        another tokenizer made them.
        """
        directory = directory or Path(self.config.data.dir)
        if self.tokenizer_sha256 is None:
            logger.info(f"{self.source} keeps no tokenizer: taking that of {directory}")
        dataset = open_dataset(directory, self.config.model.vocab_size)
        if self.tokenizer_sha256 not in (None, dataset.tokenizer.sha256):
            raise ConfigError(
                f"{directory}: prepared with another tokenizer than the model of {self.source};"
                " prepare it with the model's"
            )
        return dataset


def on_any_device(config: Config) -> Config:
    """The configuration without the implementations that a run asked for, which its device may
    have had alone.
    """
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention="auto", code="auto")
    )


# ---------------------------------------------------------------------------------------------- artifacts


def tokenizer_beside(path: Path, suffix: str) -> Path:
    """Where the tokenizer of an artifact lies: `model.tokenizer.model` beside `model.sngpt`."""
    return path.with_name(f"{path.stem}.tokenizer{suffix}")


def to_variables(tensors: Mapping[str, np.ndarray], config: Config, mesh: Mesh) -> Variables:
    """Exported tensors by path as the variables of the model that `config` describes, laid out
    over `mesh`.

    What no export keeps starts at 0. Raises `ArtifactError` that names tensors which are missing,
    too many, or misshapen.
    """
    shapes = abstract_variables(config.model)
    wanted = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    kept = {name: leaf for name, leaf in wanted.items() if is_exported(leaf.dtype)}
    wrong = [f"{name} is missing" for name in kept if name not in tensors]
    wrong += [f"{name} is none of the model's" for name in tensors if name not in kept]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(leaf.shape)}"
        for name, leaf in kept.items()
        if name in tensors and tensors[name].shape != leaf.shape
    ]
    if wrong:
        raise ArtifactError(
            "its tensors are not those of its configuration:"
            f" {'; '.join(wrong[:5])}{'; …' * (len(wrong) > 5)}"
        )
    leaves = [
        tensors[name] if name in kept else np.zeros(leaf.shape, leaf.dtype)
        for name, leaf in wanted.items()
    ]
    return jax.device_put(
        jax.tree.unflatten(jax.tree.structure(shapes), leaves), state_shardings(mesh, shapes)
    )


def from_artifact(path: Path, mesh: Mesh) -> TrainedModel:
    """The model in the artifact `path`, dequantized, laid out over `mesh`. Raises `ArtifactError`
    in one line.
    """
    content = artifact.read(path)
    try:
        about = content.metadata
        config = on_any_device(config_file.parse(about.get("config"), "config", ArtifactError))
        # tracing what a file claims would take hours
        if config.model.num_layers > len(content.tensors):
            raise ArtifactError(
                f"it has {len(content.tensors)} tensors for model.num_layers ="
                f" {config.model.num_layers}"
            )
        step, weights, kept = about.get("step"), about.get("weights"), about.get("tokenizer")
        if (
            type(step) is not int
            or step < 0
            or weights not in get_args(Weights)
            or not (kept is None or _names_tokenizer(kept))
        ):
            raise ArtifactError("its metadata lack step, weights or tokenizer")
        variables = to_variables(
            {name: dequantize(tensor) for name, tensor in content.tensors.items()}, config, mesh
        )
    except (ArtifactError, ConfigError) as error:
        raise ArtifactError(f"{path}: {error}; export it again with this version") from None
    beside = tokenizer_beside(path, kept["suffix"]) if kept else None
    return TrainedModel(
        config,
        variables,
        step,
        str(weights),
        path,
        tokenizer_path=beside if beside and beside.is_file() else None,
        tokenizer_sha256=kept["sha256"] if kept else None,
    )


def _names_tokenizer(kept: Any) -> bool:
    return (
        isinstance(kept, dict)
        and isinstance(kept.get("sha256"), str)
        and kept.get("suffix") in (".model", ".json")
    )
