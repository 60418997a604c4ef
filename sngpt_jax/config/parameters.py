"""Every parameter and statistic of the models in one table: how each is updated, exported, counted.

`optim.groups`, `artifact.policy` and `training.cost` look a tensor up by its path.
"""

import functools
import re
from typing import Literal, NamedTuple

OptimizerGroup = Literal["embed", "table", "matrix", "projection", "scalar", "code_bias"]
ExportGroup = Literal["mlp", "attention", "projection", "embed", "table", "control"]
CountedAs = Literal[
    "embed", "positions", "sae_bias", "bigram", "value_embed", "mlp", "attention", "control"
]


class Parameter(NamedTuple):
    """One row: the tensors whose whole path matches `pattern`."""

    pattern: str
    optimizer: OptimizerGroup | None  # None: a statistic, which no gradient reaches
    export: ExportGroup
    counted: CountedAs | None  # the line of `plan` that counts it; None: a statistic
    multiplied: bool = False  # whether a forward pass multiplies each token's vector with it


# Muon orthogonalizes linear maps. Tables and sets of per-channel weights have two axes too, but are
# no linear maps.
PARAMETERS = (
    Parameter(r"embed/table", "embed", "embed", "embed", multiplied=True),
    Parameter(r"positions/table", "embed", "embed", "positions"),
    Parameter(r"blocks/\d+/attn/(query|key|value|out)", "matrix", "attention", "attention", True),
    Parameter(r"blocks/\d+/attn/gate_weight", "scalar", "control", "attention", True),
    Parameter(r"blocks/\d+/attn/(q_gain|gate_bias|value_mix)", "scalar", "control", "control"),
    Parameter(r"blocks/\d+/mlp/(up|down)", "matrix", "mlp", "mlp", True),
    Parameter(r"blocks/\d+/(attn|mlp)_(norm|scale)", "scalar", "control", "control"),
    Parameter(r"blocks/\d+/resid_mix", "scalar", "control", "control"),
    Parameter(r"blocks/\d+/code/bias", "code_bias", "control", "sae_bias"),
    Parameter(r"blocks/\d+/code/(mean|std|last_fired)", None, "control", None),
    Parameter(r"final_norm|skip_weights|smear/gate", "scalar", "control", "control"),
    Parameter(r"recycle/(scale|bias)", "scalar", "control", "control"),
    Parameter(r"bigram/table", "table", "table", "bigram"),
    Parameter(r"bigram/proj", "projection", "projection", "bigram", True),
    Parameter(r"bigram/scale", "scalar", "control", "bigram"),
    Parameter(r"value_embed/table", "table", "table", "value_embed"),
    Parameter(r"value_embed/proj", "projection", "projection", "value_embed", True),
    Parameter(r"value_embed/(scale|layer_scale)", "scalar", "control", "value_embed"),
)


@functools.cache
def parameter(path: str) -> Parameter:
    """The row of the tensor at `path`. Raises ValueError if no row matches."""
    for row in PARAMETERS:
        if re.fullmatch(row.pattern, path):
            return row
    raise ValueError(f"tensor {path} has no row in sngpt_jax.config.parameters; add one")
