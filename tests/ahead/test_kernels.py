"""Compiled kernels, read from small samples of PTX, the assembler's log and XLA's dump.

With jax's CUDA plugin a test compiles real kernels.
"""

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels.case import Cost

from sngpt_jax import plan
from sngpt_jax.ahead import kernels as inspect
from sngpt_jax.ahead import programs, ptx, targets
from sngpt_jax.ahead.cases import CaseArguments, select
from sngpt_jax.base.errors import UserError
from tests.kernels import toy_case

ROOT = Path(__file__).parents[2]

MODULE = """
.version 9.0
.target sm_90a
.address_size 64

.extern .shared .align 16 .b8 global_smem[];

.visible .entry first_kernel(
	.param .u64 .ptr .align 256 first_kernel_param_0
)
.reqntid 128, 1, 1
{
	.reg .b32 	%r<192>;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 0, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r2}, %rd1, %rd2, 1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	{
	.reg .pred p;
	}
	ret;
}
	// .globl	second_kernel
.visible .entry second_kernel(
)
{
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];
	ret;
}
"""

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'second_kernel' for 'sm_90a'
ptxas info    : Function properties for second_kernel
    48 bytes stack frame, 44 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 8320 bytes smem
ptxas info    : Compile time = 12.994 ms
ptxas info    : Compiling entry function 'first_kernel' for 'sm_90a'
ptxas info    : Function properties for first_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 74 registers, used 1 barriers, 376 bytes cmem[0]
ptxas info    : Compile time = 24.140 ms
"""

THUNKS = """\
001: kCustomKernel [source       | next=002 (1)] my_kernel grid: [256, 2, 1] threads: [128, 1, 1]  shared_memory: 16384 bytes
002: kCopy         [prev=001 (1) | next=003 (1)] kCopy
006: kWhile        [prev=005 (1) | next=011 (1)]
  body:
    008: kCustomKernel [source       | next=009 (1)] my_kernel__1 grid: [128, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
011: kCustomKernel [prev=006 (1) | sink] my_kernel grid: [256, 2, 1] threads: [128, 1, 1]  shared_memory: 16384 bytes
"""  # noqa: E501 (as XLA writes it)


def test_tensor_core_instructions_are_told_apart() -> None:
    bodies = ptx.split_entries(MODULE)
    assert {name: ptx.cores(body) for name, body in bodies.items()} == {
        "first_kernel": {"wgmma": 2, "mma": 0, "tcgen05": 0},
        "second_kernel": {"wgmma": 0, "mma": 1, "tcgen05": 1},
    }
    assert ptx.split_entries(".version 9.0\n.target sm_90a\n") == {}


def test_the_assemblers_words() -> None:
    assert ptx.parse_resources(LOG) == {
        "first_kernel": {"registers": 74, "spill_bytes": 0, "static_shared_bytes": 0},
        "second_kernel": {"registers": 255, "spill_bytes": 104, "static_shared_bytes": 8320},
    }


def test_code_sizes_are_those_of_the_binarys_sections() -> None:
    names = b"\0.text.first_kernel\0.shstrtab\0.nv.info\0"
    header = bytearray(64)
    table = len(header) + len(names)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 1)
    sizes = {b".text": 640, b".shstrtab": len(names), b".nv": 99}
    headers = b"".join(
        struct.pack("<I20xQQ24x", names.index(name), 64, size) for name, size in sizes.items()
    )
    assert ptx.code_sizes(bytes(header) + names + headers) == {"first_kernel": 640}


def test_launches() -> None:
    assert inspect.parse_launches(THUNKS) == {
        "my_kernel": {"launches": 2, "blocks": 512, "threads": 128, "shared_bytes": 16384},
        "my_kernel__1": {"launches": 1, "blocks": 128, "threads": 64, "shared_bytes": 0},
    }


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (128, 128, 0, 4),  # the file of 64 Ki registers holds 512 threads of 128
        (168, 128, 0, 3),
        (169, 128, 0, 2),  # rounded up to 176
        (32, 1024, 0, 2),
        (16, 32, 0, 32),  # no more than 32 blocks
        (32, 128, 100 * 1024, 2),
        (32, 128, 114 * 1024, 1),  # of 228 KiB one is the system's in each block
    ],
)
def test_blocks_that_fit_a_multiprocessor(
    registers: int, threads: int, shared: int, blocks: int
) -> None:
    assert inspect.blocks_per_sm(targets.find("h100"), registers, threads, shared) == blocks


def _report(row: dict[str, Any] | None = None, **kernel: Any) -> dict[str, Any]:
    products = {"wgmma": 4, "mma": 0, "tcgen05": 0}
    values = {"name": "k", "pallas": True, "spill_bytes": 0, **products, **kernel}
    ours = {"implementation": "pallas_triton", "pass": "forward", "target": "h100"}
    program = ours | {"kernels": [values]} | (row or {})
    return {"cases": [{"operation": "xsa", "case": "golf", "programs": [program]}]}


SPILL, NO_PRODUCT = {"spill_bytes": 8}, {"wgmma": 0}
CUDNN = {"implementation": "cudnn", "kernels": []}


@pytest.mark.parametrize(
    ("report", "found"),
    [
        (_report(), ""),
        (_report(**SPILL), "k spills 8 bytes"),
        (_report(**NO_PRODUCT), "k uses no tensor cores"),
        (_report(**NO_PRODUCT, name="cayley_backward__1"), ""),  # it has no product
        (_report(**SPILL, pallas=False), "runs no kernel of its own"),
        (_report({"pass": "forward_backward"}, **SPILL), ""),
        (_report({"target": "a100"}, **SPILL, **NO_PRODUCT), ""),
        (_report(CUDNN | {"error": "E: no"}), "E: no"),
        (_report(CUDNN | {"cannot_serve": "f32"}), ""),
    ],
)
def test_problems(report: dict[str, Any], found: str) -> None:
    title = f"xsa golf, {report['cases'][0]['programs'][0]['implementation']} forward for h100"
    assert inspect.problems(report) == ([f"{title}: {found}"] if found else [])


def test_limits() -> None:
    limits = inspect.limits(toy_case.CASE)
    assert limits["forward"] == {
        "matmul_flops": 2 * 1024 * 64 * 64,
        "bytes": 2 * 1024 * 64 * 2,
        "h100_us": pytest.approx(2 * 1024 * 64 * 2 / 3.35232e6, abs=1e-3),
        "h200_us": pytest.approx(2 * 1024 * 64 * 2 / 4.8e6, abs=1e-3),
    }
    assert limits["forward_backward"]["matmul_flops"] == 3 * limits["forward"]["matmul_flops"]


def test_products_of_float32_take_twice_as_long() -> None:
    case = dataclasses.replace(
        toy_case.CASE, forward=Cost(989 * 10**12, 1), make=lambda key: (jnp.zeros((2, 2)),)
    )
    assert programs.limit(case, "forward", targets.find("h100")) == 2
    case = dataclasses.replace(case, make=lambda key: (jnp.zeros((2, 2), jnp.bfloat16),))
    assert programs.limit(case, "forward", targets.find("h100")) == 1


def test_a_cases_passes() -> None:
    """Values and gradients of x @ w, by algebra."""
    case = toy_case.CASE
    x, w = case.make(jax.random.key(1))
    dy = case.make(jax.random.key(2))[0]
    cotangent, *shapes = programs.abstract_arguments(case, "forward_backward")
    assert (cotangent.shape, cotangent.dtype) == (dy.shape, dy.dtype)
    assert [s.shape for s in shapes] == [x.shape, w.shape]
    y, (dx, dw) = programs.function(case, "xla", "forward_backward")(dy, x, w)
    for name, mine, left, right in (("y", y, x, w), ("dx", dx, dy, w.T), ("dw", dw, x.T, dy)):
        expected = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
        error = np.abs(np.asarray(mine, np.float64) - expected)
        print(f"{name}: max error {error.max():.3g}, mean {error.mean():.3g}")
        assert error.max() <= 2**-8 * np.abs(expected).max()
    assert np.array_equal(programs.function(case, "xla", "forward")(x, w), y)


def test_unknown_operations_and_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "expected cayley or epilogue or mlp or rotary or stream or xsa"
    with pytest.raises(UserError, match=f"no operation 'xas'; {expected}"):
        select(CaseArguments(("xas",)))
    specs = type("specs", (), {"CASES": (toy_case.CASE,)})
    monkeypatch.setitem(sys.modules, "sngpt_kernels.xsa.specs", specs)
    for chosen in (CaseArguments(("xsa",)), CaseArguments(("xsa",), "toy")):
        assert select(chosen) == [("xsa", toy_case.CASE)]
    with pytest.raises(UserError, match="--case toys: there is none; expected one of: toy"):
        select(CaseArguments(("xsa",), "toys"))


def test_without_the_plugin_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "has_plugin", lambda: False)
    with pytest.raises(UserError) as caught:
        plan.main(["--kernels", "--json"])
    needs = "compiling for a GPU needs jax's CUDA plugin, even without a GPU here"
    assert str(caught.value) == f"{needs}; run: {targets.INSTALL}"


COMPILE = """
import json
from sngpt_jax.ahead import kernels as inspect
from sngpt_jax.ahead import ptx, targets
from tests.kernels import toy_case

targets.prepare()
(report,) = inspect.inspect_cases([("toys", toy_case.CASE)], targets.TARGETS, ptx.find_ptxas())
print(json.dumps(report))
print(inspect.problems({"cases": [report]}))
print(inspect.format_case(report))
"""


@pytest.mark.slow
@pytest.mark.skipif(not targets.has_plugin(), reason=f"needs the plugin: {targets.INSTALL}")
def test_compiles_for_every_target() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report, problems, *table = done.stdout.splitlines()
    assert problems == "[]" and sum("toy_kernel" in line for line in table) == 4 + 2 * 4 + 4 + 4
    used = {"a100": "mma", "h100": "wgmma", "h200": "wgmma", "b200": "tcgen05"}
    for row in json.loads(report)["programs"]:
        ours = [kernel for kernel in row["kernels"] if kernel["pallas"]]
        backward = row["pass"] == "forward_backward"
        assert row["calls"] == {"toy_kernel": 1 + backward} and len(ours) == 1 + backward
        for k in ours:
            print(row["target"], k)
            found = [name for name in ("mma", "wgmma", "tcgen05") if k[name]]
            assert found == [used[row["target"]]]
            assert (k["blocks"], k["threads"], k["launches"]) == (1024 // 64, 128, 1)
            assert k["spill_bytes"] == 0 and 16 < k["registers"] < 255 and k["instructions"] > 100
            assert 0 < k["blocks_per_sm"] <= 16 and k["shared_bytes"] >= 2 * 64 * 64 * 2
        assert (len(row["kernels"]) > len(ours)) == backward  # the product for dw is XLA's
