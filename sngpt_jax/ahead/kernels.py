"""Every kernel, compiled for GPUs that this machine need not have.

`python -m sngpt_jax.plan --kernels [OPERATION] [--target h100] [--json [PATH]]`. Every case of
every operation is compiled, forward alone and with its backward pass. The report shows the
resources of each kernel, and for each case the least time on H100 and H200. The exit status is 1
if `problems` finds one.
"""

import itertools
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from sngpt_kernels import dispatch
from sngpt_kernels.case import Case

from sngpt_jax.ahead import by_loop, hlo, programs, ptx, sass, targets, trips
from sngpt_jax.ahead.cases import InspectArguments, select
from sngpt_jax.ahead.targets import Target
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError

IMPLEMENTATIONS = ("pallas_triton", "cudnn", "tokamax")  # those with kernels of their own
DEFAULT_TARGETS = ("a100", "h100", "b200")  # one per architecture
MOST_AT_A_TIME = 4  # programs that compile at once; each takes about 1 GB of memory
LIMITS_ON = ("h100", "h200")
CUT_FOR = ("h100", "h200")  # by the block sizes chosen without a measurement
# kernels that multiply no matrices
WITHOUT_PRODUCTS = (
    *("cayley_backward", "cayley_bias_gradient", "epilogue_forward", "epilogue_backward"),
    *("rotary_forward", "rotary_backward", "stream_forward", "stream_backward"),
)


@dataclass(frozen=True)
class Counted:
    """How often the loops of a case's kernels run, to count instructions; empty: count none."""

    nvdisasm: str = ""
    kernels: Mapping[str, trips.Loop] = field(default_factory=dict)


def compile_program(
    case: Case, implementation: str, which: str, target: Target, ptxas: str, counted: Counted
) -> dict[str, Any]:
    """Compiles one pass of one implementation: its part of a report row."""
    start = time.monotonic()
    sharding = SingleDeviceSharding(targets.devices(target)[0])
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for a in programs.abstract_arguments(case, which)
    ]
    function = jax.jit(programs.function(case, implementation, which))
    with targets.tracing(target):
        lowered = function.trace(*arguments).lower()
    with tempfile.TemporaryDirectory(prefix="xla_dump_") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compiled = lowered.compile(compiler_options={**targets.COMPILER_OPTIONS, **dump})
        modules, thunks = (
            [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob(pattern))]
            for pattern in ("*.ptx", "*.thunk_sequence.txt")
        )
    program = hlo.analyse(compiled.as_text())
    calls, launches = program.custom_kernels(), parse_launches("".join(thunks))
    codes: dict[str, ptx.Code] = {}
    for module in modules:
        ours = any(base_name(name) in counted.kernels for name in ptx.split_entries(module))
        found = ptx.assemble(ptxas, module, counted.nvdisasm if ours else "")
        codes |= {code.name: code for code in found}
    if codes and not launches:
        raise RuntimeError("XLA's dump of thunks names no launches; its format has changed")
    memory = compiled.memory_analysis()
    return {
        "compile_seconds": round(time.monotonic() - start, 1),
        # the most memory beside arguments and results
        "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
        "moved_bytes": program.bytes,  # read and written by all kernels, if no cache held any
        "calls": calls,  # in one run, of kernels that XLA did not generate
        "kernels": [
            describe(codes[name], launch, base_name(name) in calls, target)
            | count(codes[name], launch, case, counted)
            for name, launch in launches.items()
            if name in codes  # kernels of libraries have no PTX
        ],
    }


def base_name(name: str) -> str:
    """A kernel's name without the number that XLA adds to equal names."""
    return re.sub(r"__\d+$", "", name)


def parse_launches(text: str) -> dict[str, dict[str, int]]:
    """The launches of the kernels, in the program's order, from XLA's dump of its thunks.

    Shared memory excludes the bytes that the kernel's code declares.
    """
    found: dict[str, dict[str, int]] = {}
    triple = r"\[(\d+), (\d+), (\d+)\]"
    pattern = rf"([\w$]+) grid: {triple} threads: {triple}\s+shared_memory: (\d+) bytes"
    for name, *numbers in re.findall(pattern, text):
        x, y, z, tx, ty, tz, shared = map(int, numbers)
        found[name] = {
            "launches": found[name]["launches"] + 1 if name in found else 1,  # loops run more
            "blocks": x * y * z,
            "threads": tx * ty * tz,  # per block
            "shared_bytes": shared,  # per block
        }
    return found


def blocks_per_sm(target: Target, registers: int, threads: int, shared_bytes: int) -> int:
    """The blocks of a kernel that a multiprocessor holds at a time.

    A warp gets registers in units of 256, and every block takes another KiB of shared memory (CUDA
    C++ programming guide, compute capabilities).
    """
    warps = -(-threads // 32)
    by_registers = 65536 // (warps * (-(-32 * registers // 256) * 256))
    by_memory = target.shared_memory // (shared_bytes + 1024)
    return min(by_registers, by_memory, 64 // warps, 32)


def describe(
    code: ptx.Code, launch: dict[str, int], is_pallas: bool, target: Target
) -> dict[str, Any]:
    """A kernel as plain values. `is_pallas`: it is written here and not generated by XLA."""
    values = {"pallas": is_pallas, **launch, **asdict(replace(code, loops=None))}
    del values["loops"]
    values["shared_bytes"] += values.pop("static_shared_bytes")
    sizes = code.registers, launch["threads"], values["shared_bytes"]
    return values | {"blocks_per_sm": blocks_per_sm(target, *sizes)}


def count(
    code: ptx.Code, launch: dict[str, int], case: Case, counted: Counted
) -> dict[str, list[dict[str, Any]]]:
    """The rows of a kernel's loops, if they were read."""
    if code.loops is None:
        return {}
    loops = counted.kernels[base_name(code.name)]
    programs = launch["blocks"] / math.prod(case.abstract()[0].shape[:-1])
    found = by_loop.rows(code.loops, loops, case.work, programs, launch["threads"] // 32)
    return {"by_loop": [asdict(row) for row in found]}


def limits(case: Case) -> dict[str, Any]:
    """The least work of each pass, and the least microseconds for it."""
    result: dict[str, Any] = {}
    for which in programs.PASSES:
        result[which] = asdict(programs.cost(case, which))
        for target in map(targets.find, LIMITS_ON):
            result[which][f"{target.name}_us"] = round(1e6 * programs.limit(case, which, target), 3)
    return result


def inspect_program(
    operation: str,
    case: Case,
    implementation: str,
    which: str,
    target: Target,
    ptxas: str,
    counted: Counted,
) -> dict[str, Any]:
    """One program's row of the report."""
    row: dict[str, Any] = {"implementation": implementation, "pass": which, "target": target.name}
    try:
        row |= compile_program(case, implementation, which, target, ptxas, counted)
    except dispatch.CannotServe as reason:
        row["cannot_serve"] = str(reason)
    except Exception as error:  # any failure, so that the other programs still compile
        row["error"] = programs.first_line(error)
    cli.progress(f"{operation} {case.name}: {title_of(row)}: {outcome(row)}")
    return row


def inspect_cases(
    cases: Sequence[tuple[str, Case]], chosen: Sequence[Target], ptxas: str, nvdisasm: str = ""
) -> list[dict[str, Any]]:
    """The report of each case: its arguments, its limits and its programs.

    With a disassembler, instructions per token are counted by loop.
    """
    counted = [
        Counted(nvdisasm, trips.of(case.interpret, chosen[0].device))
        if nvdisasm and case.interpret
        else Counted()
        for _, case in cases
    ]
    # Forward passes go first: the other programs have their kernels too, and a process compiles a
    # kernel once.
    jobs = [
        (operation, case, implementation, which, target, ptxas, loops)
        for which in programs.PASSES
        for (operation, case), loops in zip(cases, counted, strict=True)
        for implementation in case.implementations
        if implementation in IMPLEMENTATIONS
        for target in chosen
    ]
    with ThreadPoolExecutor(min(MOST_AT_A_TIME, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(lambda job: inspect_program(*job), jobs))
    return [
        {
            "operation": operation,
            "case": case.name,
            "arguments": [f"{a.dtype}{list(a.shape)}" for a in case.abstract()],
            "limits": limits(case),
            "programs": [row for job, row in zip(jobs, rows, strict=True) if job[1] is case],
        }
        for operation, case in cases
    ]


def title_of(row: dict[str, Any]) -> str:
    """The program of a row."""
    return f"{row['implementation']} {row['pass']} for {row['target']}"


def outcome(row: dict[str, Any]) -> str:
    """The result of a program in a few words."""
    if "cannot_serve" in row:
        return f"cannot serve: {row['cannot_serve']}"
    return row.get("error") or f"{len(row['kernels'])} kernels, {row['compile_seconds']} s"


def problems(report: dict[str, Any]) -> list[str]:
    """The problems of the compiled programs, one line each.

    Spills of forward kernels and products without tensor cores are problems only on the GPUs that
    the block sizes are chosen for.
    """
    found = []
    rows = [(case, row) for case in report["cases"] for row in case["programs"]]
    for case, row in rows:
        title = f"{case['operation']} {case['case']}, {title_of(row)}"
        if "error" in row:
            found.append(f"{title}: {row['error']}")
        pallas = [kernel for kernel in row.get("kernels", ()) if kernel["pallas"]]
        if row["implementation"] == "pallas_triton" and "kernels" in row and not pallas:
            found.append(f"{title}: runs no kernel of its own")
        for kernel in pallas if row["target"] in CUT_FOR else ():
            name, spilled = kernel["name"], kernel["spill_bytes"]
            if row["pass"] == "forward" and spilled:
                found.append(f"{title}: {name} spills {spilled} bytes")
            multiplies = base_name(name) not in WITHOUT_PRODUCTS
            if multiplies and not kernel["wgmma"] + kernel["mma"] + kernel["tcgen05"]:
                found.append(f"{title}: {name} uses no tensor cores")
    return found


_COLUMNS = {  # the titles of the printed table
    "registers": "registers",
    "spills": "spill_bytes",
    "shared": "shared_bytes",
    "threads": "threads",
    "blocks": "blocks",
    "an SM": "blocks_per_sm",
    "wgmma": "wgmma",
    "mma": "mma",
    "tcgen05": "tcgen05",
    "instructions": "instructions",
}


def format_case(case: dict[str, Any]) -> str:
    """A case for a person."""
    lines = [f"{case['operation']} {case['case']}   {', '.join(case['arguments'])}"]
    for which, limit in case["limits"].items():
        at_least = ", ".join(f"{name} {limit[f'{name}_us']:,.1f} µs" for name in LIMITS_ON)
        work = f"{limit['bytes'] / 1e6:,.1f} MB and {limit['matmul_flops'] / 1e9:,.2f} GFLOP"
        lines.append(f"  {which}: {work} at least: {at_least}")
    for row in case["programs"]:
        if "kernels" not in row:
            lines.append(f"  {title_of(row)}: {outcome(row)}")
            continue
        pallas = [kernel for kernel in row["kernels"] if kernel["pallas"]]
        calls = ", ".join(f"{times} × {name}" for name, times in row["calls"].items())
        lines.append(
            f"  {title_of(row)}: {calls or 'no kernel of its own'};"
            f" {len(row['kernels']) - len(pallas)} kernels by XLA;"
            f" {row['moved_bytes'] / 1e6:,.1f} MB moved,"
            f" {row['temporary_bytes'] / 1e6:,.1f} MB temporary"
        )
        width = max((len(kernel["name"]) for kernel in pallas), default=0)
        if pallas:
            lines.append(f"    {'':{width}}" + "".join(f"  {title:>7}" for title in _COLUMNS))
        for kernel in pallas:
            cells = (f"  {kernel[key]:{max(7, len(title))}}" for title, key in _COLUMNS.items())
            lines.append(f"    {kernel['name']:{width}}" + "".join(cells))
        for kernel in pallas:
            lines += by_loop.format_rows(kernel)
    return "\n".join(lines)


def run(arguments: InspectArguments) -> int:
    """Compiles the chosen cases and reports them. Returns the exit status."""
    cases = select(arguments)
    if arguments.first:
        cases = [next(group) for _, group in itertools.groupby(cases, lambda pair: pair[0])]
    try:
        chosen = [targets.find(name) for name in dict.fromkeys(arguments.target or DEFAULT_TARGETS)]
        targets.prepare()
        ptxas, nvdisasm = ptx.find_ptxas(), sass.find_nvdisasm() if arguments.sass else ""
    except (ValueError, targets.MissingToolchain) as error:
        raise UserError(str(error)) from None
    # A program from the cache leaves no PTX to read.
    jax.config.update("jax_enable_compilation_cache", False)
    known = ptx.architectures(ptxas)
    for target in [target for target in chosen if target.arch not in known]:
        cli.progress(f"{target.name} is left out: {ptxas} does not know {target.arch}")
        chosen.remove(target)
    report: dict[str, Any] = {
        "jax": jax.__version__,
        "targets": {t.name: {"device": t.kind, "arch": t.arch} for t in chosen},
        "cases": inspect_cases(cases, chosen, ptxas, nvdisasm),
    }
    if arguments.json != "-":
        print("\n\n".join(map(format_case, report["cases"])), flush=True)
        if nvdisasm:
            print("", by_loop.format_totals(report["cases"]), sep="\n", flush=True)
    report["problems"] = problems(report)
    for line in report["problems"]:
        cli.progress(f"problem: {line}")
    cli.write_json(report, arguments.json)
    return 1 if report["problems"] else 0
