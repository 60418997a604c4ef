"""The policy of least error below a limit of bytes, for `export --tune-to-fit`.

The search tries the recipe's own policy, half precision, and two families of grids. In the first
family the range of a row is its largest magnitude, and the number of bits sets the step. In the
second family the grid is wide, and its step is a fraction of the row's standard deviation. The
search bisects this fraction until the artifact just fits. This is SDClip with independent range and
step: the entropy coder measures the cost of a fine step, so no weight need be clipped.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sngpt_jax.artifact import sngpt_file
from sngpt_jax.artifact.account import relative_error
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config, ExportConfig

# bits of MLP and attention matrices
LADDER = ((8, 8), (7, 7), (6, 6), (5, 6), (5, 5), (4, 5), (4, 4), (3, 4), (3, 3))
# ranges of an int8 grid in standard deviations: steps of 1/16 and of 4 deviations
FINEST, COARSEST = 8.0, 512.0
BISECTIONS = 8  # determine the range within 1.6 %


def search(
    tensors: Mapping[str, np.ndarray],
    config: Config,
    metadata: Callable[[Config], dict[str, Any]],
    limit: int,
    tell: Callable[[str], None],
    moments: Mapping[str, np.ndarray] | None = None,
) -> Config:
    """`config` with the tried policy of least `relative_error` whose artifact takes at most `limit`
    bytes. `tell` receives one line per trial. `moments` are for GPTQ, as in `quantize_tensors`.
    Raises `UserError` if no trial fits.
    """
    wide = replace(
        config.export,
        mlp_bits=8,
        attention_bits=8,
        embed_bits=8,
        table_bits=8,
        clip="row_max",
        table_clip="row_max",
        clip_scope="row",
        codes="symmetric",
        late_key_layers=0,
        prune_fraction=0.0,
        clip_floor=0.0,
        table_clip_floor=None,
        table_codes="as_matrices",
        packed=False,
        codec="rans",
        codec_level=22,
    )
    halves = replace(
        wide, mlp_bits=16, attention_bits=16, projection_bits=16, embed_bits=16, table_bits=16
    )
    trials: list[tuple[float, int, ExportConfig]] = []  # error and bytes of each policy

    def fits(export: ExportConfig) -> bool:
        candidate = replace(config, export=export)
        stored = quantize_tensors(tensors, candidate, moments)
        size = len(sngpt_file.encode(metadata(candidate), stored, storage_of(export)).data)
        error = relative_error(tensors, stored)
        trials.append((error, size, export))
        rule = f"sd {export.clip_sd:.2f}" if export.clip == "sd" else export.clip
        bits = f"{export.mlp_bits} bits mlp, {export.attention_bits} attention"
        verdict = "fits" if size <= limit else f"{size - limit:,} too many"
        policy = f"{bits}, {rule}, {export.codec}"
        tell(f"{policy:<40} {size:>12,} bytes  rel. MSE {error:.3e}  {verdict}")
        return size <= limit

    fits(config.export)
    fits(halves)
    for mlp, attention in LADDER:
        if fits(replace(wide, mlp_bits=mlp, attention_bits=attention)):
            break  # the rest are smaller and have larger errors
    fine, coarse = FINEST, COARSEST
    for _ in range(BISECTIONS):
        middle = (fine * coarse) ** 0.5
        small = fits(replace(wide, clip="sd", clip_sd=round(middle, 3)))
        fine, coarse = (fine, middle) if small else (middle, coarse)
    fitting = [(error, export) for error, size, export in trials if size <= limit]
    if not fitting:
        least = min(size for _, size, _ in trials)
        raise UserError(
            f"no policy fits into {limit:,} bytes of artifact: the smallest artifact of the trials"
            f" takes {least:,} bytes; raise --limit"
        )
    return replace(config, export=min(fitting, key=lambda trial: trial[0])[1])


def storage_of(export: ExportConfig) -> Storage:
    """The policy's way to turn codes into bytes."""
    return Storage(packed=export.packed, codec=export.codec, level=export.codec_level)
