"""Stacks dealt out to devices against numpy matrix by matrix, for every layout, and what the
devices send each other.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sngpt_jax.cluster.mesh import ALL_AXES, PARAMETER_AXES, make_mesh, partition_spec, split_of
from sngpt_jax.optim import stacks

# more matrices than devices, fewer, one; square, wide with its transposed; not divisible; too
# small to be split
SHAPES = (*((64, 64),) * 9, *((64, 96), (96, 64)) * 2, (128, 64), *((67, 71),) * 2, *((8, 16),) * 3)
LAYOUTS = [  # devices, fsdp, axes over which the matrices are split
    (1, 1, PARAMETER_AXES),
    (2, 1, PARAMETER_AXES),
    (8, 1, PARAMETER_AXES),
    (8, 1, ALL_AXES),
    (8, 8, PARAMETER_AXES),
    (8, 2, PARAMETER_AXES),
    (8, 2, ALL_AXES),
    (2, 2, PARAMETER_AXES),
]


def cubed(stack):
    """X Xᵀ X: of the transposed it is the transposed, of zeros zeros, and every element depends on
    the whole matrix.
    """
    return jnp.matmul(jnp.matmul(stack, stack.mT, precision="highest"), stack, precision="highest")


def values():
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


def program(devices, fsdp, kept_over, function=cubed, dtype=jnp.float32):
    """The jitted form, as the training step has it, and its arguments where gradients and momentum
    lie.
    """
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    placed = [
        jax.device_put(x, NamedSharding(mesh, partition_spec(mesh, x.shape, kept_over)))
        for x in values()
    ]
    results = [NamedSharding(mesh, partition_spec(mesh, x.shape)) for x in placed]
    form = functools.partial(
        stacks.map_stacks, function, dtype=dtype, mesh=mesh, kept_over=kept_over
    )
    return jax.jit(lambda matrices: form(matrices), out_shardings=results), placed


@pytest.mark.parametrize(("devices", "fsdp", "kept_over"), LAYOUTS)
def test_every_device_gets_its_pieces_of_every_result(devices, fsdp, kept_over):
    mapped, placed = program(devices, fsdp, kept_over)
    for x, got in zip(values(), mapped(placed), strict=True):
        exact = np.float64(x) @ np.float64(x).T @ np.float64(x)
        assert got.dtype == jnp.float32
        # also those that make up no part of the array as it is read
        for shard in got.addressable_shards:
            np.testing.assert_allclose(shard.data, exact[shard.index], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("devices", "fsdp", "kept_over"), LAYOUTS)
def test_at_most_two_collectives_for_a_distinct_shape(devices, fsdp, kept_over):
    """In the compiled program: an all-gather where results are whole everywhere, an all-to-all
    where they are split, and an all-to-all before it where the matrices are."""
    mapped, placed = program(devices, fsdp, kept_over)
    text = mapped.lower(placed).compile().as_text()
    found = {
        kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
        for kind in ("all-gather", "all-to-all", "all-reduce")
    }
    mesh, want = (
        make_mesh(jax.devices()[:devices], fsdp),
        {"all-gather": 0, "all-to-all": 0, "all-reduce": 0},
    )
    for shape, count in (((64, 64), 9), ((64, 96), 4), ((64, 128), 1), ((67, 71), 2), ((8, 16), 3)):
        given, wanted = (
            split_of(partition_spec(mesh, shape, over)) for over in (kept_over, PARAMETER_AXES)
        )
        if devices > 1 and (count > 1 or given):
            want["all-to-all"] += bool(given) + bool(wanted)
            want["all-gather"] += not wanted
    assert found == want
    assert not re.findall(r" (?:collective-permute|reduce-scatter)(?:-start)?\(", text)


def test_padding_and_transposition_are_not_seen():
    """Each device's program maps one stack for each distinct shape, of the share's size, wide."""
    seen = []

    def spy(stack):
        seen.append(stack.shape)
        return cubed(stack)

    mapped, placed = program(8, 1, PARAMETER_AXES, spy)
    mapped.lower(placed)
    assert sorted(seen) == [(1, 8, 16), (1, 64, 96), (1, 64, 128), (1, 67, 71), (2, 64, 64)]


@pytest.mark.parametrize(
    ("fsdp", "kept_over"), [(1, PARAMETER_AXES), (8, PARAMETER_AXES), (1, ALL_AXES)]
)
def test_results_in_bfloat16_are_sent_in_it_and_arrive_whole(fsdp, kept_over):
    def rounded(stack):
        return cubed(stack).astype(jnp.bfloat16).astype(jnp.float32)

    mapped, placed = program(8, fsdp, kept_over, rounded, jnp.bfloat16)
    for x, got in zip(values(), mapped(placed), strict=True):
        got = np.asarray(got)
        np.testing.assert_array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_allclose(
            got, np.float64(x) @ np.float64(x).T @ np.float64(x), rtol=2.0**-8, atol=1e-3
        )
    lines = [
        line
        for line in mapped.lower(placed).as_text().splitlines()
        if re.search(r"stablehlo\.all_(gather|to_all)", line)
    ]
    sent = [re.search(r"-> tensor<[\dx]*(\w+)>", line)[1] for line in lines]
    on_the_way_in = sum(
        split_of(partition_spec(make_mesh(fsdp=fsdp), shape, kept_over)) is not None
        for shape in set(SHAPES)
    )
    assert sent.count("bf16") >= 4
    assert sent.count("f32") <= on_the_way_in
