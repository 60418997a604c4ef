"""Matrices of equal shape as one stack; each device of a mesh works on its share of the stack.

The devices redistribute the stack, each maps its share of whole matrices, and they exchange the
results. That takes at most two collective operations per shape, for any number of matrices:

  matrices            before the function        after it, if parameters are
                                                 replicated    split over fsdp
  replicated          none: take the own share   all-gather    all-to-all
  split               all-to-all                 all-gather    all-to-all

With n devices, each does about 1/n of the work. Before the function it sends 1/n of all matrices'
bytes if they are split; after it all of them (all-gather) or 1/fsdp (all-to-all), in bfloat16 if
the function computes in it. A stack that n does not divide is padded with zeros, which are sent.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import BATCH_AXES, PARAMETER_AXES, partition_spec, split_of

Shape = tuple[int, ...]


def one_kernel(array: jax.Array) -> jax.Array:
    """`array`, which a GPU computes once. XLA would compute it again in each kernel that uses it.

    It is a compiler's barrier: a CPU's compiler drops it before it joins operations.
    """
    # as a vector, because XLA would keep a transposed matrix as it was and turn it in every kernel
    return jax.lax.optimization_barrier(array.ravel()).reshape(array.shape)


def read_by_all(scalar: jax.typing.ArrayLike) -> jax.Array:
    """`scalar`, as a part of a small array.

    XLA on GPUs updates arrays of equal shape in one kernel if they read another array in common. A
    common scalar does not count.
    """
    return one_kernel(jnp.stack([jnp.asarray(scalar)] * 2))[0]


def is_dealt_out(count: int, shape: Shape, mesh: Mesh, kept_over: tuple[str, ...]) -> bool:
    """Whether the devices share a stack of `count` matrices of this shape: not if there is a
    single device, or one matrix that every device has whole.
    """
    is_split = split_of(partition_spec(mesh, shape, kept_over)) is not None
    return mesh.size > 1 and (count > 1 or is_split)


def map_stacks(
    function: Callable[[jax.Array], jax.Array],
    matrices: Sequence[jax.Array],
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
    kept_over: tuple[str, ...] = PARAMETER_AXES,
) -> list[jax.Array]:
    """`function` of each of the float32 `matrices`, in float32.

    `function` maps a stack [S, m, n], m ≤ n, to one of equal shape; tall matrices are transposed.
    It must map each matrix independently, commute with transposition, and map zeros to finite
    numbers. Its results are sent as `dtype`, which must hold them exactly. With `mesh` the matrices
    lie as `partition_spec(mesh, shape, kept_over)` says, and the results as the parameters do.
    """
    results = list(matrices)
    stacks: dict[Shape, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        stacks[min(matrix.shape), max(matrix.shape)].append(index)
    for shape, members in stacks.items():
        members.sort(key=lambda i: matrices[i].shape != shape)  # tall matrices last
        found = [matrices[i] for i in members]
        if mesh is not None and is_dealt_out(len(found), shape, mesh, kept_over):
            found = _dealt_out(function, found, dtype, mesh, kept_over)
        else:
            wide = sum(matrix.shape == shape for matrix in found)
            found = _unstacked(function(one_kernel(_stacked(found, wide))), wide)
        for i, matrix in zip(members, found, strict=True):
            results[i] = matrix.astype(jnp.float32)
    return results


def _stacked(matrices: list[jax.Array], wide: int) -> jax.Array:
    """[S, m, n]: the first `wide` matrices, then the others, transposed."""
    parts = [jnp.stack(matrices[:wide])] if wide else []
    if tall := matrices[wide:]:
        # otherwise XLA keeps each of them transposed, in all its uses
        parts.append(jnp.stack([matrix.mT for matrix in one_kernel(jnp.stack(tall))]))
    return jnp.concatenate(parts)


def _unstacked(stack: jax.Array, wide: int) -> list[jax.Array]:
    """The matrices of `_stacked(matrices, wide)`."""
    if wide == len(stack):
        return [*stack]
    return [*stack[:wide], *one_kernel(stack[wide:].mT)]


def _dealt_out(
    function: Callable[[jax.Array], jax.Array],
    matrices: list[jax.Array],
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    kept_over: tuple[str, ...],
) -> list[jax.Array]:
    """The results for matrices of one shape, or its transpose, of which the wide ones come first.

    They have `dtype`.
    """
    count, m, n = len(matrices), *sorted(matrices[0].shape)
    wide = sum(matrix.shape == (m, n) for matrix in matrices)
    given, wanted = partition_spec(mesh, (m, n), kept_over), partition_spec(mesh, (m, n))
    rows = math.ceil(count / mesh.size)

    def local(pieces: list[jax.Array]) -> list[jax.Array]:
        stack = jnp.pad(_stacked(pieces, wide), ((0, rows * mesh.size - count), (0, 0), (0, 0)))
        split = split_of(given)
        over = split[1] if split else ()
        # devices along these axes have equal pieces
        alike = tuple(name for name in BATCH_AXES if name not in over)
        order = alike + over  # in which the devices take the rows
        if alike:
            own = len(stack) // jax.lax.axis_size(alike)
            stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(alike) * own, own)
        if split:
            stack = jax.lax.all_to_all(
                stack, over, split_axis=0, concat_axis=1 + split[0], tiled=True
            )
        results = function(one_kernel(stack)).astype(dtype)

        split = split_of(wanted)
        if split is None:
            results = jax.lax.all_gather(results, order, tiled=True)
        else:  # one piece per device along fsdp, equal for all devices along data
            parts = jnp.stack(jnp.split(results, mesh.shape["fsdp"], axis=1 + split[0]))
            sizes = (mesh.shape[name] for name in order)
            for_all = jnp.expand_dims(parts, order.index("data"))
            for_all = jnp.broadcast_to(for_all, (*sizes, *parts.shape[1:]))
            results = jax.lax.all_to_all(
                for_all.reshape(-1, *parts.shape[2:]), order, 0, 0, tiled=True
            )
        return _unstacked(results[:count], wide)

    deal = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=([partition_spec(mesh, matrix.shape, kept_over) for matrix in matrices],),
        out_specs=[partition_spec(mesh, matrix.shape) for matrix in matrices],
        check_vma=False,
    )
    return deal(matrices)
