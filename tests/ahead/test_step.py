"""The figures of a compiled step. tests/deviceless compiles real steps."""

import pytest

from sngpt_jax.ahead import step as topology
from sngpt_jax.ahead.hlo import Kernel, Program
from sngpt_jax.ahead.targets import parse_topology

H100 = parse_topology("h100x1")[0]
LOOP = "jit(train_step)/gradient/shard_map/while/body/closed_call"


def kernel(name, scope, *, flops=0, moved=0, times=1):
    return Kernel(name, "fusion", times, flops, moved, False, scope)


@pytest.mark.parametrize(
    ("scope", "place"),
    [
        (f"{LOOP}/jvp(block_3)/attention/dot_general", "block_3/attention/dot_general"),
        (f"{LOOP}/transpose(jvp(block_3))/mlp/mul", "backward block_3/mlp/mul"),
        ("jit(train_step)/optimizer/shard_map/dot_general", "optimizer/dot_general"),
        ("", ""),
    ],
)
def test_a_place_is_the_scope_without_what_all_have(scope, place):
    assert topology.place_of(scope) == place


def test_the_heaviest_are_those_of_all_layers_together_by_time():
    layers = [
        kernel(f"fusion.{i}", f"{LOOP}/jvp(block_{i})/mlp/mul", moved=3_350_000_000, times=2)
        for i in range(4)
    ]
    product = kernel("gemm", f"{LOOP}/jvp(head)/dot_general", flops=98_900_000_000_000, moved=1)
    light = [kernel(f"small_{i}", "", moved=i) for i in range(20)]
    rows = topology.heaviest(Program([*light, product, *layers]), H100)

    assert len(rows) == topology.HEAVIEST
    assert [row["name"] for row in rows[:3]] == ["gemm", "fusion", "small_19"]
    assert rows[1] == {
        "name": "fusion",
        "place": "block/mlp/mul",
        "count": 8,
        "flops": 0,
        "bytes": 8 * 3_350_000_000,
        "seconds": pytest.approx(8 * 3_350_000_000 / H100.bandwidth),
    }
    assert rows[0]["seconds"] == pytest.approx(98_900_000_000_000 / H100.matmul_rate)
