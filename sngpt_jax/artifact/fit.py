"""The least lossy policy under a limit of bytes, found by trying: what `export --tune-to-fit` does.

Tried are the recipe's own policy, half precision, and two families of grids, all but the first
coded by rANS. In one family ranges follow each row's largest magnitude, and the bits of a weight
say how fine the grid is. In the other the grid is wide and its step is a share of the row's
standard deviation, bisected until the artifact just fits: SDClip with range and step told apart,
since what a fine step costs the entropy coder measures, and nothing need be clipped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sngpt_jax.artifact import file as artifact
from sngpt_jax.artifact.account import relative_error
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config, ExportConfig

# bits of MLP and attention matrices
LADDER = ((8, 8), (7, 7), (6, 6), (5, 6), (5, 5), (4, 5), (4, 4), (3, 4), (3, 3))
# ranges of an int8 grid in standard deviations: steps of 1/16 and of 4 of them
FINEST, COARSEST = 8.0, 512.0
BISECTIONS = 8  # leave the range known to 1.6 %


@dataclass(frozen=True)
class Trial:
    """A policy that was tried, what its artifact takes, and what it loses."""

    export: ExportConfig
    bytes: int
    error: float  # mean over the weights of their tensor's Σ (w - ŵ)² / Σ w²

    def describe(self, limit: int) -> str:
        """One line for a person."""
        x = self.export
        rule = f"sd {x.clip_sd:.2f}" if x.clip == "sd" else x.clip
        kept = f"{x.mlp_bits} bits mlp, {x.attention_bits} attention, {rule}, {x.codec}"
        fits = "fits" if self.bytes <= limit else f"{self.bytes - limit:,} too many"
        return f"{kept:<40} {self.bytes:>12,} bytes  rel. MSE {self.error:.3e}  {fits}"


def search(
    tensors: Mapping[str, np.ndarray],
    config: Config,
    metadata: Callable[[Config], dict[str, Any]],
    limit: int,
    tell: Callable[[str], None],
    moments: Mapping[str, np.ndarray] | None = None,
) -> Config:
    """`config` with the policy of least `relative_error`, of those tried, whose artifact takes at
    most `limit` bytes.

    `tell` is given a line for each policy that was tried. `moments` are for GPTQ, as in
    `quantize_tensors`: where the recipe asks for it every trial is rounded so, since that changes
    the size. Raises `UserError` where nothing fits.
    """
    wide = replace(
        config.export,
        embed_bits=8,
        table_bits=8,
        table_clip="row_max",
        clip_scope="row",
        codes="symmetric",
        late_key_layers=0,
        prune_fraction=0.0,
        clip_floor=0.0,
        packed=False,
        codec="rans",
        codec_level=22,
    )

    def attempt(export: ExportConfig) -> Trial:
        candidate = replace(config, export=export)
        stored = quantize_tensors(tensors, candidate, moments)
        size = len(artifact.encode(metadata(candidate), stored, storage_of(export)).data)
        trial = Trial(export, size, relative_error(tensors, stored))
        tell(trial.describe(limit))
        return trial

    halves = replace(
        wide,
        mlp_bits=16,
        attention_bits=16,
        projection_bits=16,
        embed_bits=16,
        table_bits=16,
        clip="row_max",
    )
    trials = [attempt(config.export), attempt(halves)]
    for mlp, attention in LADDER:
        trials.append(
            attempt(replace(wide, mlp_bits=mlp, attention_bits=attention, clip="row_max"))
        )
        if trials[-1].bytes <= limit:
            break  # the rest are smaller and lose more
    wide = replace(wide, mlp_bits=8, attention_bits=8, clip="sd")
    fine, coarse = FINEST, COARSEST
    for _ in range(BISECTIONS):
        middle = (fine * coarse) ** 0.5
        trials.append(attempt(replace(wide, clip_sd=round(middle, 3))))
        fine, coarse = (fine, middle) if trials[-1].bytes <= limit else (middle, coarse)
    fitting = [trial for trial in trials if trial.bytes <= limit]
    if not fitting:
        least = min(trial.bytes for trial in trials)
        raise UserError(
            f"nothing fits into {limit:,} bytes of artifact: the least that was tried takes"
            f" {least:,}; raise --limit"
        )
    return replace(config, export=min(fitting, key=lambda trial: trial.error).export)


def storage_of(export: ExportConfig) -> Storage:
    """How a policy's codes are put into bytes."""
    return Storage(packed=export.packed, codec=export.codec, level=export.codec_level)
