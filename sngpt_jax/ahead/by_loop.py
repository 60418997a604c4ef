"""Instructions and barriers per token of a kernel, by loop and by kind of work.

The machine code (`sass`) says how many instructions a trip of each loop has. The interpreted kernel
(`trips`) says how often the loop runs. The two trees of loops must agree. Where the compiler has
unrolled a loop, the machine code states fewer trips than the kernel does, and their ratio is the
factor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sngpt_jax.ahead import sass
from sngpt_jax.ahead.trips import Loop


@dataclass(frozen=True)
class Row:
    """A loop's code beside the loops inside it, or a kernel's code around its loops."""

    loop: str
    depth: int  # loops around it
    trips: float  # of the machine code per token
    unrolled: (
        float | None
    )  # the kernel's trips per trip of the machine code; None: unknown, taken as 1
    instructions: int  # per trip of the machine code
    barriers: float  # per token
    warp_instructions: float  # per token
    shares: dict[str, float]  # warp instructions by kind of work


def _without_unrolled(loop: Loop, left: int) -> list[Loop]:
    """The loops inside a loop of which `left` are loops in the machine code.

    The compiler unrolls loops of few trips completely, the ones of the fewest trips first.
    """
    able = [inner for inner in loop.inside if inner.fixed and inner.entries and not inner.inside]
    able.sort(key=lambda inner: inner.trips / inner.entries)
    gone = [id(inner) for inner in able[: max(len(loop.inside) - left, 0)]]
    return [inner for inner in loop.inside if id(inner) not in gone]


def rows(
    code: sass.Loop, counted: Loop, work: Mapping[str, tuple[str, str]], programs: float, warps: int
) -> list[Row]:
    """The code of a kernel, of which a token takes `programs` programs of `warps` warps.

    `work` has, per name of a loop, the kind of work of its code and of the code after it. Code up
    to the last instruction on tensor cores is the work "products".

    Raises RuntimeError if the loops of the machine code are not the ones that were counted.
    """
    result: list[Row] = []
    times = programs / counted.trips  # of everything that was counted, for one token

    def add(code: sass.Loop, loop: Loop, depth: int) -> None:
        unrolled: float | None = None if loop.fixed and depth else 1
        if depth and code.trips and loop.trips:
            factor = loop.trips / (code.trips * loop.entries)
            if factor % 1 == 0:
                unrolled = factor
            elif loop.fixed:
                kernel = f"{loop.name} runs {loop.trips / loop.entries:g} times"
                raise RuntimeError(f"{counted.name}: {kernel}, and its machine code {code.trips}")
        inside = _without_unrolled(loop, len(code.inside))
        if len(code.inside) != len(inside):
            names = ", ".join(inner.name for inner in loop.inside) or "none"
            found = f"{len(code.inside)} in {loop.name}, which has: {names}"
            raise RuntimeError(f"{counted.name}: the machine code has other loops: {found}")
        entries = loop.entries * times if depth else 0
        trips = loop.trips * times / (unrolled or 1)
        kinds = [work.get(loop.name, ("other", ""))[0]]
        kinds += [work.get(inner.name, ("", "other"))[1] for inner in inside]
        shares = {"products": 0.0, kinds[0]: warps * code.arm.instructions * entries}
        for kind, part in zip(kinds, code.parts, strict=True):
            shares["products"] += warps * part.products * trips
            rest = warps * (part.instructions - part.products) * trips
            shares[kind] = shares.get(kind, 0) + rest
        barriers = sum(part.barriers for part in code.parts) * trips
        result.append(
            Row(
                loop=loop.name,
                depth=depth,
                trips=trips,
                unrolled=unrolled,
                instructions=sum(part.instructions for part in code.parts),
                barriers=barriers + code.arm.barriers * entries,
                warp_instructions=sum(shares.values()),
                shares={kind: count for kind, count in shares.items() if count},
            )
        )
        for inner in zip(code.inside, inside, strict=True):
            add(*inner, depth + 1)

    add(code, counted, 0)
    return result


def totals(rows: Sequence[dict[str, Any]]) -> tuple[float, float, str]:
    """Warp instructions and barriers per token of a kernel's rows, and the shares in words."""
    count, barriers = (sum(row[key] for row in rows) for key in ("warp_instructions", "barriers"))
    kinds: dict[str, float] = {}
    for row in rows:
        for kind, share in row["shares"].items():
            kinds[kind] = kinds.get(kind, 0) + share / count
    parts = sorted(kinds.items(), key=lambda kind: -kind[1])
    return count, barriers, ", ".join(f"{kind} {share:.0%}" for kind, share in parts)


def format_rows(kernel: dict[str, Any]) -> list[str]:
    """The lines of a kernel's loops."""
    if "by_loop" not in kernel:
        return []
    lines = [
        f"    {kernel['name']} by loop, per token",
        f"      {'loop':26}  {'trips':>8}  {'unrolled':>8}  {'code':>6}  {'barriers':>8}"
        f"  {'warp instructions':>17}",
    ]
    for row in kernel["by_loop"]:
        unrolled = "?" if row["unrolled"] is None else f"{row['unrolled']:g}"
        lines.append(
            f"      {'  ' * row['depth'] + row['loop']:26}  {row['trips']:8.2f}  {unrolled:>8}"
            f"  {row['instructions']:6,}  {row['barriers']:8.1f}  {row['warp_instructions']:17,.0f}"
        )
    return lines


def format_totals(cases: Sequence[dict[str, Any]]) -> str:
    """The kernels whose instructions are counted, as a table in Markdown."""
    lines = [
        "| case | target | kernel | warp instructions per token | barriers | kinds of work |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        for program in case["programs"]:
            for kernel in program.get("kernels", ()):
                if program["pass"] != "forward" and "by_loop" in kernel:
                    count, barriers, kinds = totals(kernel["by_loop"])
                    what = f"{case['case']} | {program['target']} | `{kernel['name']}`"
                    lines.append(f"| {what} | {count:,.0f} | {barriers:.0f} | {kinds} |")
    return "\n".join(lines)
