"""The device mesh, and which array is laid out how over it.

The mesh has two axes: the batch is split over both, a parameter over `fsdp` where a rule below says so.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")

# The first rule whose pattern is found in a leaf's path decides how that leaf (and its optimizer state) is laid out.
PARAMETER_RULES: tuple[tuple[str, P], ...] = ((r".*", P()),)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), with every device on the `data` axis."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(-1, 1), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a pytree leaf as `blocks/0/attn/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf of `tree` (parameters, or a whole training state), by `PARAMETER_RULES`."""

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        spec = next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, path_name(path)))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_placer(mesh: Mesh, num_microbatches: int | None = None) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """A function that puts a host batch of [B, ...] arrays on the mesh, rows split over all devices.

    With `num_microbatches` = A the arrays become [A, B/A, ...] first, for accumulation. Every process passes the whole
    global batch; each device receives its rows alone.
    """
    spec = P(BATCH_AXES) if num_microbatches is None else P(None, BATCH_AXES)
    sharding = NamedSharding(mesh, spec)

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        placed: dict[str, jax.Array] = {}
        for name, rows in batch.items():
            if num_microbatches is not None:
                rows = rows.reshape(num_microbatches, -1, *rows.shape[1:])
            placed[name] = jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        return placed

    return place
