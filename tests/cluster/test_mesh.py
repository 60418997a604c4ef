"""Layouts over the mesh, and that gathered pieces are the whole and scattered means the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import (
    ALL_AXES,
    BATCH_AXES,
    PARAMETER_AXES,
    gather,
    make_mesh,
    partition_spec,
    partition_specs,
    reduce_mean,
    state_shardings,
)

SHAPES = {
    "table": (331, 64),  # a prime number of tokens
    "up": (64, 256),
    "down": (256, 64),
    "square": (64, 64),
    "stack": (3, 64, 96),
    "odd": (67, 71),  # nothing to split evenly
    "small": (8, 256),
    "vector": (8192,),
    "scalar": (),
}
SPLIT = {"table": 1, "up": 1, "down": 0, "square": 0, "stack": 2}  # the axis, where there is one


def values(seed=0, devices=()):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(*devices, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def test_the_mesh_has_neighbours_along_fsdp():
    mesh = make_mesh(fsdp=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert mesh.devices.tolist() == np.asarray(jax.devices()).reshape(4, 2).tolist()
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(jax.devices()[:2], fsdp=2).shape) == {"data": 1, "fsdp": 2}


@pytest.mark.parametrize("fsdp", [3, 16, 0])
def test_devices_that_do_not_divide_are_one_line(fsdp):
    said = f"train.fsdp = {fsdp} does not divide the 8 devices; set it to one of: 1, 2, 4, 8$"
    with pytest.raises(UserError, match=said):
        make_mesh(fsdp=fsdp)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((50257, 2048), P(None, "fsdp")),  # 50257 is odd
        ((50304, 1024), P("fsdp")),
        ((2048, 8192), P(None, "fsdp")),
        ((8192, 2048), P("fsdp")),
        ((2048, 2048), P("fsdp")),  # the first of equals
        ((1024, 2048), P(None, "fsdp")),  # positions
        ((131072,), P()),
        ((2048,), P()),
        ((7, 584), P()),  # 4088 elements
        ((8, 512), P(None, "fsdp")),  # 4096
        ((4097, 4099), P()),
        ((), P()),
    ],
)
def test_layouts_of_real_shapes(shape, spec):
    for fsdp in (2, 4, 8):
        assert partition_spec(make_mesh(fsdp=fsdp), shape) == spec
    assert partition_spec(make_mesh(), shape) == P()


def test_a_piece_over_all_devices_is_a_part_of_the_piece_over_fsdp():
    mesh = make_mesh(fsdp=2)
    assert partition_spec(mesh, (64, 256), ALL_AXES) == P(None, ALL_AXES)
    parts, pieces = (
        NamedSharding(mesh, partition_spec(mesh, (64, 256), over)).devices_indices_map((64, 256))
        for over in (ALL_AXES, PARAMETER_AXES)
    )
    for device, (_, part) in parts.items():
        piece = pieces[device][1]
        assert piece.start <= part.start == part.stop - 256 // 8 and part.stop <= piece.stop


@given(st.lists(st.integers(0, 4096), max_size=4).map(tuple), st.sampled_from([1, 2, 4, 8]))
def test_a_layout_splits_at_most_one_axis_and_evenly(shape, fsdp):
    mesh = make_mesh(fsdp=fsdp)
    spec = partition_spec(mesh, shape)
    NamedSharding(mesh, spec).shard_shape(shape)  # raises where the axis does not divide
    assert list(spec).count("fsdp") <= 1 and set(spec) <= {"fsdp", None}
    if list(spec).count("fsdp"):
        split = shape[len(spec) - 1]
        assert all(length <= split or length % fsdp for length in shape)


def test_a_state_is_laid_out_by_its_shapes():
    mesh = make_mesh(fsdp=4)
    weights, key = jnp.zeros((64, 128)), jax.random.key(0)
    state = {"w": weights, "moment": (weights, weights), "step": jnp.int32(0), "key": key}
    split, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())
    want = {"w": split, "moment": (split, split), "step": whole, "key": whole}
    assert state_shardings(mesh, state) == want
    assert state_shardings(mesh, jax.eval_shape(lambda: state)) == want
    placed = jax.device_put(state, want)
    assert {shard.data.shape for shard in placed["w"].addressable_shards} == {(64, 32)}


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_gathered_pieces_are_the_whole(fsdp):
    mesh, tree = make_mesh(fsdp=fsdp), values()
    specs = partition_specs(mesh, tree)
    split = {name: list(spec).index("fsdp") for name, spec in specs.items() if spec != P()}
    assert split == (SPLIT if fsdp > 1 else {})
    placed = jax.device_put(tree, state_shardings(mesh, tree))
    for name, spec in specs.items():
        sizes = {shard.data.size for shard in placed[name].addressable_shards}
        assert sizes == {tree[name].size // (fsdp if spec != P() else 1)}

    # every device's own result, side by side
    each = jax.shard_map(
        lambda pieces: jax.tree.map(lambda x: x[None], gather(pieces, specs)),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(BATCH_AXES),
        check_vma=False,
    )
    for name, got in jax.jit(each)(placed).items():
        want = np.broadcast_to(tree[name], (8, *SHAPES[name]))
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize(
    ("fsdp", "over"),
    [(1, PARAMETER_AXES), (2, PARAMETER_AXES), (8, PARAMETER_AXES), (1, ALL_AXES), (2, ALL_AXES)],
)
def test_the_mean_of_all_devices_lies_where_its_parameters_or_moments_lie(fsdp, over):
    mesh, tree = make_mesh(fsdp=fsdp), values(1, devices=(8,))
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    specs = partition_specs(mesh, shapes, over)
    mean = jax.shard_map(
        lambda each: reduce_mean(jax.tree.map(lambda x: x[0], each), specs),
        mesh=mesh,
        in_specs=(P(BATCH_AXES),),
        out_specs=specs,
        check_vma=False,
    )
    means = jax.jit(mean)(tree)
    for name, sharding in state_shardings(mesh, shapes, over).items():
        got = means[name]
        assert got.sharding.is_equivalent_to(sharding, got.ndim), name
        want = tree[name].mean(0, dtype=np.float64)
        # all shards, also those that make up no part of the array as it is read
        for shard in got.addressable_shards:
            near = want[shard.index]
            np.testing.assert_allclose(shard.data, near, rtol=0, atol=1e-6, err_msg=name)
    text = jax.jit(mean).lower(tree).as_text()
    scattered = len(SPLIT) if fsdp > 1 or over == ALL_AXES else 0
    assert text.count("stablehlo.reduce_scatter") == scattered
    assert "stablehlo.all_gather" not in text
