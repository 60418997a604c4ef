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
from jax.sharding import PartitionSpec as P

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
        wide = [i for i in members if matrices[i].shape == shape]
        tall = [i for i in members if matrices[i].shape != shape]
        stack = jnp.stack([matrices[i] for i in wide]) if wide else jnp.zeros((0, *shape))
        if tall:  # one kernel, or XLA keeps each of them transposed for all its uses
            turned = one_kernel(jnp.stack([matrices[i] for i in tall])).mT
            stack = jnp.concatenate([stack, turned])
        if mesh is not None and is_dealt_out(len(members), shape, mesh, kept_over):
            stack = _dealt_out(function, stack, dtype, mesh, kept_over)
        else:
            stack = function(one_kernel(stack))
        # one kernel transposes all of them, and the kernels that use them need not
        stacked = one_kernel(stack[len(wide) :].mT) if tall else []
        for i, matrix in zip(wide + tall, [*stack[: len(wide)], *stacked], strict=True):
            results[i] = matrix.astype(jnp.float32)
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
        pieces = jnp.pad(pieces, ((0, rows * mesh.size - count), (0, 0), (0, 0)))
        split = split_of(given)
        over = split[1] if split else ()
        # devices along these axes have equal pieces
        alike = tuple(name for name in BATCH_AXES if name not in over)
        order = alike + over  # in which the devices take the rows
        if alike:
            own = len(pieces) // jax.lax.axis_size(alike)
            pieces = jax.lax.dynamic_slice_in_dim(pieces, jax.lax.axis_index(alike) * own, own)
        if split:
            pieces = jax.lax.all_to_all(
                pieces, over, split_axis=0, concat_axis=1 + split[0], tiled=True
            )
        results = function(one_kernel(pieces)).astype(dtype)

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
        return results[:count]

    deal = jax.shard_map(
        local, mesh=mesh, in_specs=P(None, *given), out_specs=P(None, *wanted), check_vma=False
    )
    return deal(stack)
