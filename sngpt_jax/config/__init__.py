"""The configuration of a run. Its dataclasses, which recipes import from here, are in `fields`."""

from sngpt_jax.config.fields import (
    FORMAT,
    Clip,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    Weights,
    differences,
    microbatches,
    profile_window,
    to_json,
)

__all__ = [
    "FORMAT",
    "Clip",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "Weights",
    "differences",
    "microbatches",
    "profile_window",
    "to_json",
]
