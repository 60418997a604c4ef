"""The device mesh, and which array is laid out how over it.

The mesh has two axes. The batch is split over both. Along `fsdp` the devices share out the
parameters, and all that is kept beside them in their shapes: optimizer state, averages. A step
gathers the weights once, computes with whole ones, adds up the whole gradient of its rows, and
scatters that once (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054). With `train.shard_optimizer`
what is kept beside the parameters is shared out over both axes instead, whatever becomes of the
parameters. `gather` and `reduce_mean` do so inside `jax.shard_map`, so that neither depends on
what a partitioner makes of a loop.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError

BATCH_AXES = ("data", "fsdp")
PARAMETER_AXES = ("fsdp",)
# fsdp first: along one axis, a piece of what is split over both is part of the parameter's piece
ALL_AXES = ("fsdp", "data")

_LEAST_ELEMENTS = 2**12  # of an array that is worth a collective operation of its own


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh ("data", "fsdp") over `devices` (default: all of them), with `fsdp` neighbours on the
    second axis.

    Raises `UserError` where `fsdp` does not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        fitting = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise UserError(
            f"train.fsdp = {fsdp} does not divide the {len(devices)} devices; set it to one of:"
            f" {fitting}"
        )
    return Mesh(
        np.asarray(devices).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto)
    )


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a pytree leaf as `blocks/0/attn/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path (`path_name`), in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# ---------------------------------------- parameters and their like


def partition_spec(mesh: Mesh, shape: tuple[int, ...], over: tuple[str, ...] = PARAMETER_AXES) -> P:
    """How an array of this shape is laid out: along which of its axes, if any, it is split over
    the mesh's axes `over`.

    Split is the largest axis that the devices divide. Of equal ones it is the first: pieces of
    that are contiguous in memory, so that gathering them moves nothing twice. Vectors, scalars and
    arrays of fewer than 4,096 elements stay whole.

    The shape alone decides, so that a parameter's moments and averages lie where it lies, and that
    matrices of equal shape, which Muon stacks, lie alike. Rules by path would say the same of
    every path.
    """
    size = math.prod(mesh.shape[name] for name in over)
    if size == 1 or len(shape) < 2 or math.prod(shape) < _LEAST_ELEMENTS:
        return P()
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if not divisible:
        return P()
    split = max(divisible, key=lambda axis: shape[axis])  # the first of equals
    return P(*(None,) * split, over if len(over) > 1 else over[0])


def partition_specs(mesh: Mesh, tree: Any, over: tuple[str, ...] = PARAMETER_AXES) -> Any:
    """The `partition_spec` of every leaf of `tree`, arrays or their abstract forms."""
    return jax.tree.map(lambda leaf: partition_spec(mesh, np.shape(leaf), over), tree)


def state_shardings(mesh: Mesh, tree: Any, over: tuple[str, ...] = PARAMETER_AXES) -> Any:
    """A `NamedSharding` for every leaf of `tree` (parameters, or what is kept beside them), by
    `partition_spec`.
    """
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, partition_spec(mesh, np.shape(leaf), over)), tree
    )


def split_of(spec: P) -> tuple[int, tuple[str, ...]] | None:
    """Which axis of an array a `partition_spec` splits, and over which axes of the mesh; None
    where it splits none.
    """
    for axis, names in enumerate(spec):
        if names is not None:
            return axis, (names,) if isinstance(names, str) else tuple(names)
    return None


def gather(tree: Any, specs: Any) -> Any:
    """Each device's pieces of arrays laid out by `specs` → the whole arrays. Inside `shard_map`
    with `check_vma=False`.
    """

    def whole(piece: jax.Array, spec: P) -> jax.Array:
        split = split_of(spec)
        return (
            piece
            if split is None
            else jax.lax.all_gather(piece, split[1], axis=split[0], tiled=True)
        )

    return jax.tree.map(whole, tree, specs)


def reduce_mean(tree: Any, specs: Any) -> Any:
    """Whole arrays that differ from device to device → each device's pieces, by `specs`, of their
    mean over all devices.

    Inside `shard_map` with `check_vma=False`.
    """

    def mean(x: jax.Array, spec: P) -> jax.Array:
        split = split_of(spec)
        if split is None:
            return jax.lax.pmean(x, BATCH_AXES)
        axis, over = split
        # pieces first, so that the devices along `data` exchange 1/fsdp of the bytes
        piece = jax.lax.psum_scatter(x, over, scatter_dimension=axis, tiled=True)
        rest = tuple(
            name for name in BATCH_AXES if name not in over and jax.lax.axis_size(name) > 1
        )
        return jax.lax.psum(piece, rest) / jax.lax.axis_size(BATCH_AXES)

    return jax.tree.map(mean, tree, specs)


# ---------------------------------------- batches


def batch_placer(
    mesh: Mesh, num_microbatches: int | None = None
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """A function that puts a host batch of [B, ...] arrays on the mesh, rows split over all
    devices.

    With `num_microbatches` = A the arrays become [A, B/A, ...] first, for accumulation. Every
    process passes the whole global batch; each device receives its rows alone.
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
