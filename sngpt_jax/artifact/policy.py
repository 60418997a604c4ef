"""The policy of a tensor, for the exporter and for late quantization-aware training.

A grid is a row's scale times integers. A row of a matrix [in, out] is an output channel, along the
last axis. A row of a table [entries, width] is an entry.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sngpt_jax.config import Clip, Config, ExportConfig
from sngpt_jax.config.parameters import ExportGroup, parameter

MATRICES: tuple[ExportGroup, ...] = ("mlp", "attention", "projection")
FLOAT16, FLOAT32 = 16, 32  # bits of tensors without a grid

# The smallest normal float16. Smaller scales would lose bits and vanish.
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True)
class Policy:
    """How one tensor is exported."""

    group: ExportGroup
    bits: int  # of its grid, 2 to 8; FLOAT16 or FLOAT32 without a grid
    clip: Clip  # the rule for the range of a row
    clip_sd: float  # the range of a row in standard deviations, for clip = sd
    transposed: bool  # whether rows lie along the tensor's last axis

    @property
    def has_grid(self) -> bool:
        return self.bits <= 8


def is_exported(dtype: np.dtype) -> bool:
    """Whether tensors of this dtype are part of an artifact. Step counts serve training only."""
    return bool(np.issubdtype(dtype, np.floating))


def largest_code(bits: int) -> int:
    """q of a grid of `bits` bits: codes run from -q to q."""
    return 2 ** (bits - 1) - 1


def of_tables(export: ExportConfig) -> ExportConfig:
    """The settings with `clip_floor` and `codes` as embeddings and tables have them."""
    floor = export.clip_floor if export.table_clip_floor is None else export.table_clip_floor
    codes = export.codes if export.table_codes == "as_matrices" else export.table_codes
    return replace(export, clip_floor=floor, codes=codes)


def policy_of(path: str, shape: Sequence[int], config: Config) -> Policy:
    """The policy of the tensor of this path, such as `blocks/0/attn/key`, and this shape."""
    x = config.export
    group = parameter(path).export
    of_matrix = group in MATRICES
    clip, clip_sd = (x.clip, x.clip_sd) if of_matrix else (x.table_clip, x.table_clip_sd)
    if group == "control":
        bits = FLOAT16 if x.control_dtype == "float16" else FLOAT32
    elif math.prod(shape) <= x.passthrough_size:
        bits = FLOAT16
    else:
        key = re.fullmatch(r"blocks/(\d+)/attn/key", path)
        late = key and int(key[1]) >= config.model.num_layers - x.late_key_layers
        bits = FLOAT16 if late else getattr(x, f"{group}_bits")
    return Policy(group, bits, clip, clip_sd, transposed=of_matrix)
