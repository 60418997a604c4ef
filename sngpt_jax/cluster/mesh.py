"""The device mesh, and how arrays are laid out over it.

The batch is split over both axes of the mesh. Along `fsdp` the devices share the parameters, and
with them optimizer state and averages. A step gathers the weights once, computes with whole ones,
and scatters the sum of the gradient once (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054). With
`train.shard_optimizer` the optimizer state and averages are split over both axes. `gather` and
`reduce_mean` run inside `jax.shard_map`, so that no partitioner can move them into a loop.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError

BATCH_AXES = ("data", "fsdp")
PARAMETER_AXES = ("fsdp",)
# fsdp first, so that a piece of an array split over both axes is part of the parameter's piece
ALL_AXES = ("fsdp", "data")

_LEAST_ELEMENTS = 2**12  # a smaller array is not worth a collective operation

# Limits of a buffer of gradients. XLA joins reductions below 30 MiB, and a kernel takes at most 96
# arrays.
_BUFFER_BYTES = 2**25
_BUFFER_ARRAYS = 48


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh ("data", "fsdp") over `devices` (default: all), with neighbours along `fsdp`.

    Raises `UserError` if `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"train.fsdp = {fsdp} does not divide the {count} devices; set it to one of: {fitting}"
        )
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a pytree leaf as `blocks/0/attn/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by `path_name`, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def partition_spec(mesh: Mesh, shape: tuple[int, ...], over: tuple[str, ...] = PARAMETER_AXES) -> P:
    """The layout of an array of this shape, split over the mesh's axes `over` or not at all.

    The largest axis that the devices divide is split; of equal ones the first, whose pieces are
    contiguous in memory. Vectors, scalars and small arrays stay whole. Only the shape decides, so
    a parameter's moments and averages lie where it lies, as do matrices that Muon stacks.
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
    """The `partition_spec` of every leaf of `tree`."""
    return jax.tree.map(lambda leaf: partition_spec(mesh, np.shape(leaf), over), tree)


def state_shardings(mesh: Mesh, tree: Any, over: tuple[str, ...] = PARAMETER_AXES) -> Any:
    """The `NamedSharding` of every leaf of `tree`, by `partition_spec`."""
    specs = partition_specs(mesh, tree, over)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def split_of(spec: P) -> tuple[int, tuple[str, ...]] | None:
    """The axis of an array that a `partition_spec` splits, and the mesh's axes; None if none is."""
    for axis, names in enumerate(spec):
        if names is not None:
            return axis, (names,) if isinstance(names, str) else tuple(names)
    return None


def gather(tree: Any, specs: Any) -> Any:
    """Each device's pieces of arrays, laid out by `specs` → the whole arrays.

    Call it inside `shard_map` with `check_vma=False`.
    """

    def whole(piece: jax.Array, spec: P) -> jax.Array:
        split = split_of(spec)
        if split is None:
            return piece
        return jax.lax.all_gather(piece, split[1], axis=split[0], tiled=True)

    return jax.tree.map(whole, tree, specs)


def reduce_mean(tree: Any, specs: Any) -> Any:
    """Whole arrays, which differ per device → each device's pieces of their mean, by `specs`.

    Call it inside `shard_map` with `check_vma=False`. Arrays that stay whole are reduced side by
    side in few buffers. XLA would join their reductions too, but late: the results would then be
    cut apart by a kernel per array, instead of within the kernels that use them.
    """
    arrays, structure = jax.tree.flatten(tree)
    each = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))
    splits = [split_of(spec) for spec in each]
    whole = [i for i, split in enumerate(splits) if split is None]
    means = dict(zip(whole, _whole_means([arrays[i] for i in whole]), strict=True))
    for i, split in enumerate(splits):
        if split is None:
            continue
        axis, over = split
        # pieces first, so that the devices along `data` exchange 1/fsdp of the bytes
        piece = jax.lax.psum_scatter(arrays[i], over, scatter_dimension=axis, tiled=True)
        rest = [name for name in BATCH_AXES if name not in over and jax.lax.axis_size(name) > 1]
        means[i] = jax.lax.psum(piece, tuple(rest)) / jax.lax.axis_size(BATCH_AXES)
    return jax.tree.unflatten(structure, [means[i] for i in range(len(arrays))])


def _whole_means(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The means of whole arrays over all devices."""
    devices = jax.lax.axis_size(BATCH_AXES)
    if devices == 1:
        return list(arrays)
    buffers: list[list[jax.Array]] = []
    size = 0
    for array in arrays:
        size += array.nbytes
        fits = size <= _BUFFER_BYTES and len(buffers[-1]) < _BUFFER_ARRAYS if buffers else False
        if not fits or array.dtype != buffers[-1][0].dtype:
            buffers.append([])
            size = array.nbytes
        buffers[-1].append(array)
    means = []
    for members in buffers:
        ends = np.cumsum([array.size for array in members])[:-1]
        joined = jnp.concatenate([array.ravel() for array in members])
        pieces = jnp.split(jax.lax.psum(joined, BATCH_AXES), ends)
        for piece, array in zip(pieces, members, strict=True):
            means.append(piece.reshape(array.shape) / devices)
    return means


def batch_placer(
    mesh: Mesh, num_microbatches: int | None = None
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """A function that puts the whole batch of [B, ...] host arrays on the mesh, and splits its
    rows over all devices. With `num_microbatches` = A the arrays become [A, B/A, ...].
    """
    spec = P(BATCH_AXES) if num_microbatches is None else P(None, BATCH_AXES)
    sharding = NamedSharding(mesh, spec)

    def put(rows: np.ndarray) -> jax.Array:
        if num_microbatches is not None:
            rows = rows.reshape(num_microbatches, -1, *rows.shape[1:])
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    return lambda batch: {name: put(rows) for name, rows in batch.items()}
