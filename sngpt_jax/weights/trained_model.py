"""A trained model in memory, and the way from an exported artifact to it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.artifact import sngpt_file
from sngpt_jax.artifact.header import ArtifactError
from sngpt_jax.artifact.policy import is_exported
from sngpt_jax.artifact.quantize import dequantize
from sngpt_jax.base import typed_json
from sngpt_jax.cluster.mesh import leaves_by_path, state_shardings
from sngpt_jax.config import Config, ConfigError, Weights, changed
from sngpt_jax.config import file as config_file
from sngpt_jax.data.shards import Dataset, open_dataset
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.model.forward import Variables, abstract_variables

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model: its configuration, its variables on the mesh, and their origin."""

    config: Config
    variables: Variables  # parameters, with the statistics of sparse codes in their places
    step: int  # of the run
    weights: str  # final, swa or ema
    source: Path  # run directory or artifact
    tokenizer_path: Path | None = None  # the source's copy, if it keeps one
    tokenizer_sha256: str | None = None  # None if unknown

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `ConfigError` if the source keeps none or another one."""
        if self.tokenizer_path is None:
            raise ConfigError(f"{self.source}: keeps no tokenizer; {self._remedy()}")
        tokenizer = load_tokenizer(self.tokenizer_path)
        if self.tokenizer_sha256 not in (None, tokenizer.sha256):
            wrong = f"{self.tokenizer_path}: not the tokenizer of {self.source}"
            raise ConfigError(f"{wrong}; {self._remedy()}")
        return tokenizer

    def _remedy(self) -> str:
        if self.source.is_dir():
            return "import its weights with --tokenizer into another --run-dir"
        name = tokenizer_beside(self.source, ".*").name
        return f"put the tokenizer that export wrote, {name}, beside it again"

    def open_data(self, directory: Path | None = None) -> Dataset:
        """The prepared data in `directory`, or else in the recipe's folder. Raises `UserError` if
        another tokenizer prepared them.
        """
        directory = directory or Path(self.config.data.dir)
        if self.tokenizer_sha256 is None:
            logger.info(f"{self.source} keeps no tokenizer: taking the tokenizer of {directory}")
        dataset = open_dataset(directory, self.config.model.vocab_size)
        if self.tokenizer_sha256 not in (None, dataset.tokenizer.sha256):
            raise ConfigError(
                f"{directory}: prepared with another tokenizer than the model of {self.source};"
                " prepare it with the model's"
            )
        return dataset


def on_any_device(config: Config) -> Config:
    """`config` without the implementations that the run named, which other devices may lack."""
    fields = "attention", "rotary", "stream", "mlp", "code"
    return changed(config, model=dict.fromkeys(fields, "auto"))


@dataclass(frozen=True)
class TokenizerMark:
    """The tokenizer of an artifact."""

    sha256: str
    suffix: Literal[".model", ".json"]


@dataclass(frozen=True)
class Metadata:
    """The metadata of an artifact."""

    config: Any
    tokenizer: TokenizerMark | None
    step: int
    weights: Weights
    version: str  # of the exporter


def tokenizer_beside(path: Path, suffix: str) -> Path:
    """The tokenizer's place beside an artifact: `model.tokenizer.model` beside `model.sngpt`."""
    return path.with_name(f"{path.stem}.tokenizer{suffix}")


def to_variables(tensors: Mapping[str, np.ndarray], config: Config, mesh: Mesh) -> Variables:
    """The variables of the model of `config` from its exported tensors, laid out over `mesh`. The
    others start at 0. Raises `ArtifactError` that names missing, unknown and misshapen tensors.
    """
    shapes = abstract_variables(config.model)
    leaves = leaves_by_path(shapes)
    exported = {name: leaf.shape for name, leaf in leaves.items() if is_exported(leaf.dtype)}
    wrong = [f"{name} is missing" for name in exported if name not in tensors]
    for name, tensor in tensors.items():
        if name not in exported:
            wrong.append(f"{name} is not a tensor of the model")
        elif tensor.shape != exported[name]:
            wrong.append(f"{name} is {list(tensor.shape)}, expected {list(exported[name])}")
    if wrong:
        listed = "; ".join(wrong[:5]) + "; …" * (len(wrong) > 5)
        raise ArtifactError(f"its tensors do not match its configuration: {listed}")
    values = [
        tensors[name] if name in exported else np.zeros(leaf.shape, leaf.dtype)
        for name, leaf in leaves.items()
    ]
    variables = jax.tree.unflatten(jax.tree.structure(shapes), values)
    return jax.device_put(variables, state_shardings(mesh, shapes))


def from_artifact(path: Path, mesh: Mesh) -> TrainedModel:
    """The dequantized model of the artifact `path`, laid out over `mesh`; or `ArtifactError`."""
    content = sngpt_file.read(path)
    try:
        about = typed_json.parse(Metadata, content.metadata, "metadata", ArtifactError)
        config = on_any_device(config_file.parse(about.config, "config", ArtifactError))
        # tracing the layers that a hostile file claims would take hours
        if about.step < 0 or config.model.num_layers > len(content.tensors):
            layers = f"{len(content.tensors)} tensors for {config.model.num_layers} layers"
            raise ArtifactError(f"step {about.step}, {layers}")
        tensors = {name: dequantize(tensor) for name, tensor in content.tensors.items()}
        variables = to_variables(tensors, config, mesh)
    except (ArtifactError, ConfigError) as error:
        raise ArtifactError(f"{path}: {error}; export it again with this version") from None
    kept = about.tokenizer
    beside = tokenizer_beside(path, kept.suffix) if kept else None
    return TrainedModel(
        config,
        variables,
        about.step,
        about.weights,
        path,
        tokenizer_path=beside if beside and beside.is_file() else None,
        tokenizer_sha256=kept.sha256 if kept else None,
    )
