"""Matrices of equal shape as one stack, of which each device of a mesh works on its share.

A function of single matrices, such as an orthogonalization, needs each of them whole, but on one
device only. So the devices deal a stack out to each other, each maps its share, and they exchange
the results. That takes one collective operation or two for a distinct shape, whatever the number
of matrices:

  matrices lie        on the way in                        on the way back, where parameters are
                                                           whole everywhere         split over fsdp
  whole everywhere    none: each takes its share           all-gather               all-to-all
  split               all-to-all: pieces for matrices      all-gather               all-to-all

Bytes on the links a device and step, of n devices, in the bytes of all matrices: on the way in 1/n
where they are split, on the way back 1 for an all-gather or 1/fsdp for an all-to-all, in bfloat16
where the function computes in it. The devices then do about 1/n of the work each: a stack that n
does not divide is padded with zeros, which are sent too. `is_dealt_out` is the rule.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.cluster.mesh import BATCH_AXES, PARAMETER_AXES, partition_spec, split_of

Shape = tuple[int, ...]


def by_shape(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """The indices of the `shapes` that go into one stack, by the stack's matrix shape (m, n) with
    m ≤ n: tall matrices are transposed, so that those of a layer up and of the layer down share a
    stack."""
    members: dict[Shape, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        members[min(shape), max(shape)].append(index)
    return dict(members)


def is_dealt_out(count: int, shape: Shape, mesh: Mesh, kept_over: tuple[str, ...]) -> bool:
    """Whether the devices share out a stack of `count` matrices of this shape: the one place where
    that is decided.

    Always, but for a single device, and for one matrix that every device has whole: there all map
    it, and nothing is sent.
    """
    return mesh.size > 1 and (
        count > 1 or split_of(partition_spec(mesh, shape, kept_over)) is not None
    )


def map_stacks(
    function: Callable[[jax.Array], jax.Array],
    matrices: Sequence[jax.Array],
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
    kept_over: tuple[str, ...] = PARAMETER_AXES,
) -> list[jax.Array]:
    """`function` of each of the `matrices`, float32 as they are.

    It takes a stack [S, m, n] with m ≤ n to one of the same shape and must map every matrix by
    itself, the transposed to the transposed and zeros to finite numbers. Its results are sent as
    `dtype`, which is to hold them exactly. With `mesh` the matrices lie as `partition_spec(mesh,
    shape, kept_over)` says, and the results as the parameters.
    """
    results = list(matrices)
    for shape, members in by_shape([matrix.shape for matrix in matrices]).items():
        stack = jnp.stack(
            [matrices[i] if matrices[i].shape == shape else matrices[i].mT for i in members]
        )
        if mesh is not None and is_dealt_out(len(members), shape, mesh, kept_over):
            stack = _dealt_out(function, stack, dtype, mesh, kept_over)
        else:
            stack = function(stack)
        for i, matrix in zip(members, stack, strict=True):
            results[i] = matrix if matrices[i].shape == shape else matrix.mT
    return results


def _dealt_out(
    function: Callable[[jax.Array], jax.Array],
    stack: jax.Array,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    kept_over: tuple[str, ...],
) -> jax.Array:
    count, shape = len(stack), stack.shape[1:]
    given, wanted = partition_spec(mesh, shape, kept_over), partition_spec(mesh, shape)
    rows = math.ceil(count / mesh.size)

    def local(pieces: jax.Array) -> jax.Array:
        """Each device's pieces of the whole stack → its pieces of the results."""
        pieces = jnp.pad(pieces, ((0, rows * mesh.size - count), (0, 0), (0, 0)))
        split = split_of(given)
        over = split[1] if split else ()
        # devices along these have the same pieces
        alike = tuple(name for name in BATCH_AXES if name not in over)
        order = alike + over  # in which the devices take the rows
        if alike:
            own = len(pieces) // jax.lax.axis_size(alike)
            pieces = jax.lax.dynamic_slice_in_dim(pieces, jax.lax.axis_index(alike) * own, own)
        if split:
            pieces = jax.lax.all_to_all(
                pieces, over, split_axis=0, concat_axis=1 + split[0], tiled=True
            )
        results = function(pieces).astype(dtype)

        split = split_of(wanted)
        if split is None:
            results = jax.lax.all_gather(results, order, tiled=True)
        else:  # a piece for each device along fsdp, the same for all of them along data
            parts = jnp.stack(jnp.split(results, mesh.shape["fsdp"], axis=1 + split[0]))
            for_all = jnp.expand_dims(parts, order.index("data"))
            for_all = jnp.broadcast_to(
                for_all, (*(mesh.shape[name] for name in order), *parts.shape[1:])
            )
            results = jax.lax.all_to_all(
                for_all.reshape(-1, *parts.shape[2:]),
                order,
                split_axis=0,
                concat_axis=0,
                tiled=True,
            )
        return results[:count].astype(jnp.float32)

    deal = jax.shard_map(
        local, mesh=mesh, in_specs=P(None, *given), out_specs=P(None, *wanted), check_vma=False
    )
    return deal(stack)
