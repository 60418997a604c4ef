"""Stacks dealt out to devices: numpy matrix by matrix, and what the devices send each other."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sngpt_jax.cluster.mesh import ALL_AXES, PARAMETER_AXES, make_mesh, partition_spec, split_of
from sngpt_jax.optim import stacks

# more matrices than devices, fewer, one; square, wide with its transposed; not divisible; small
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
    """X Xᵀ X, of which every element depends on the whole matrix."""
    return jnp.matmul(jnp.matmul(stack, stack.mT, precision="highest"), stack, precision="highest")


def values():
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


def program(devices, fsdp, kept_over, function=cubed, dtype=jnp.float32):
    """The jitted form, and its arguments where gradients and momentum lie."""
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    placed = [
        jax.device_put(x, NamedSharding(mesh, partition_spec(mesh, x.shape, kept_over)))
        for x in values()
    ]
    results = [NamedSharding(mesh, partition_spec(mesh, x.shape)) for x in placed]

    def form(matrices):
        return stacks.map_stacks(function, matrices, dtype, mesh, kept_over)

    return jax.jit(form, out_shardings=results), placed


@pytest.mark.parametrize(("devices", "fsdp", "kept_over"), LAYOUTS)
def test_every_device_gets_its_pieces_of_every_result(devices, fsdp, kept_over):
    mapped, placed = program(devices, fsdp, kept_over)
    for x, got in zip(values(), mapped(placed), strict=True):
        exact = np.float64(x) @ np.float64(x).T @ np.float64(x)
        assert got.dtype == jnp.float32
        for shard in got.addressable_shards:
            np.testing.assert_allclose(shard.data, exact[shard.index], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("devices", "fsdp", "kept_over"), LAYOUTS)
def test_at_most_two_collectives_for_a_distinct_shape(devices, fsdp, kept_over):
    """An all-gather where results are whole everywhere, an all-to-all where they are split, and an
    all-to-all before it where the matrices are.
    """
    mapped, placed = program(devices, fsdp, kept_over)
    text = mapped.lower(placed).compile().as_text()
    kinds = r" (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("
    mesh, want = make_mesh(jax.devices()[:devices], fsdp), []
    for shape, count in (((64, 64), 9), ((64, 96), 4), ((64, 128), 1), ((67, 71), 2), ((8, 16), 3)):
        given, wanted = (
            split_of(partition_spec(mesh, shape, over)) for over in (kept_over, PARAMETER_AXES)
        )
        if devices > 1 and (count > 1 or given):
            want += ["all-to-all"] * bool(given) + ["all-to-all" if wanted else "all-gather"]
    assert sorted(re.findall(kinds, text)) == sorted(want)


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
        exact = np.float64(x) @ np.float64(x).T @ np.float64(x)
        np.testing.assert_allclose(got, exact, rtol=2.0**-8, atol=1e-3)
    text = mapped.lower(placed).as_text()
    sent = re.findall(r"stablehlo\.all_(?:gather|to_all).*-> tensor<[\dx]*(\w+)>", text)
    mesh = make_mesh(fsdp=fsdp)
    split = [split_of(partition_spec(mesh, shape, kept_over)) for shape in set(SHAPES)]
    assert sent.count("bf16") >= 4
    assert sent.count("f32") <= sum(found is not None for found in split)  # on the way in
