"""Times every implementation of every operation on the device at hand: `python -m sngpt_jax.bench
kernels [cayley|xsa] [--json [PATH]]`.

Beside each time stand the least time that the device allows, and the error: of the output against
the float64 reference, of gradients against plain XLA in full float32. Arguments are fresh and
random, and together larger than the cache. On a host processor only small cases run. `--markdown
PATH` writes the table for a document, `--tune` tries the kernels' block sizes and writes
`kernels/<operation>/tuned/<device>.json`.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sngpt_kernels import dispatch
from sngpt_kernels.case import Case

from sngpt_jax.ahead import programs, targets
from sngpt_jax.ahead.targets import Target
from sngpt_jax.base import cli
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.bench import timing, tune

CPU_BYTES = 16 * 2**20  # of arguments: what a host processor does in seconds
REFERENCE_ELEMENTS = 2**14  # of the output that the slow reference is asked for, in whole rows
ROUNDS, QUICK_ROUNDS = 12, 4
GRADIENTS = "forward_backward"


def output_errors(
    case: Case, function: Callable[..., Any], arguments: timing.Arguments
) -> dict[str, float]:
    """Of some rows of the output against the float64 reference of those rows.

    Rows run along the first axis of the output and of the arguments that have as many axes and
    rows. A reference may return the first of its rows alone.
    """
    output = function(*arguments)
    count = max(1, REFERENCE_ELEMENTS * len(output) // output.size)
    rows = np.unique(np.linspace(0, len(output) - 1, count).astype(int))
    has_rows = [a.ndim == output.ndim and len(a) == len(output) for a in arguments]
    expected = case.reference(
        *(np.asarray(a[rows] if has else a) for a, has in zip(arguments, has_rows, strict=True))
    )
    return timing.errors(output[rows][: len(expected)], expected)


@functools.lru_cache(maxsize=1)
def exact_gradients(case: Case, rounds: int) -> tuple[jax.Array, ...]:
    """Those of `error_arguments` by plain XLA in float32, with products of full float32."""
    widened = [
        a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a
        for a in error_arguments(case, GRADIENTS, rounds)
    ]
    with jax.default_matmul_precision("highest"):
        return jax.jit(programs.function(case, "xla", GRADIENTS))(*widened)[1]


def error_arguments(case: Case, which: str, rounds: int) -> timing.Arguments:
    """What errors are taken with: the same for all implementations, other than what is timed."""
    return timing.argument_sets(case, which, None)(rounds)[0]


def gradient_errors(case: Case, function: Callable[..., Any], rounds: int) -> dict[str, float]:
    """Of the gradients against `exact_gradients`: those of the worst argument."""
    gradients = function(*error_arguments(case, GRADIENTS, rounds))[1]
    found = [
        timing.errors(*pair) for pair in zip(gradients, exact_gradients(case, rounds), strict=True)
    ]
    return max(found, key=lambda error: error["rms"])


def bench_row(
    case: Case, implementation: str, which: str, target: Target | None, rounds: int
) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"case": case.name, "implementation": implementation, "pass": which}
    try:
        function = jax.jit(programs.function(case, implementation, which))
        taken = timing.time_calls(function, timing.argument_sets(case, which, target), rounds)
        row["median_us"] = 1e6 * taken.median
        row["quartiles_us"] = [1e6 * seconds for seconds in taken.quartiles]
        if jax.devices()[0].platform != "cpu":
            row["host_bound"] = taken.is_host_bound
        if target is not None:
            row["limit_us"] = 1e6 * programs.limit(case, which, target)
            row["of_limit"] = row["limit_us"] / row["median_us"]
        if which == GRADIENTS:
            row["gradient_error"] = gradient_errors(case, function, rounds)
        else:
            row["error"] = output_errors(case, function, error_arguments(case, which, rounds))
    except dispatch.CannotServe as reason:
        row["cannot_serve"] = str(reason)
    except Exception as error:  # of whatever kind: the other rows are still of interest
        row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def left_out(case: Case, on_cpu: bool) -> str:
    """Why the case is not run on this device; "" where it is."""
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in case.abstract())
    if on_cpu and size > CPU_BYTES:
        return f"its {size / 2**20:.0f} MiB of arguments are too many for a host processor"
    return ""


# ---------------------------------------------------------------------------------------------- the table

_TITLES = (
    "case",
    "pass",
    "implementation",
    "µs",
    "quartiles",
    "limit µs",
    "of limit",
    "rms error",
    "max error",
)
_NO_TIME = {"cannot_serve": "cannot serve", "failed": "failed"}  # in the words of the table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    name, which = f"{row['operation']} {row['case']}", row["pass"].replace("_", " + ")
    for key, words in _NO_TIME.items():
        if key in row:
            return (name, which, row["implementation"], words, row[key], *("",) * 4)
    low, high = row["quartiles_us"]
    error = row.get("error") or row.get("gradient_error") or {}
    return (
        name,
        which,
        row["implementation"],
        "≤ " * row.get("host_bound", False) + f"{row['median_us']:,.1f}",
        f"{low:,.1f} to {high:,.1f}",
        f"{row['limit_us']:,.1f}" if "limit_us" in row else "",
        f"{row['of_limit']:.0%}" if "of_limit" in row else "",
        *(f"{error[kind]:.1e}" if kind in error else "" for kind in ("rms", "max")),
    )


def format_row(row: dict[str, Any]) -> str:
    """A row in one line."""
    cells = _cells(row)
    if _NO_TIME.keys() & row.keys():
        return f"{cells[0]}, {cells[1]}, {cells[2]}: {cells[3]}: {cells[4]}"
    limit = f", {cells[6]} of the limit {cells[5]} µs" if cells[5] else ""
    error = f", error {cells[7]} rms, {cells[8]} max" if cells[7] else ""
    return f"{cells[0]}, {cells[1]}, {cells[2]}: {cells[3]} µs ({cells[4]}){limit}{error}"


def format_markdown(report: dict[str, Any]) -> str:
    """The table for a document."""
    lines = [
        f"Device: {report['device']}; jax {report['jax']}; {report['platform_version']}.",
        (
            "Times are medians of a call. Errors are in units of the reference's root mean square:"
            " of outputs against float64, of"
        ),
        'gradients against `xla` in full float32. "≤": the host could not keep the device busy.',
        "",
        "| " + " | ".join(_TITLES) + " |",
        "|" + "---|" * len(_TITLES),
    ]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in report["rows"]])


# ---------------------------------------------------------------------------------------------- the command


def run_table(
    cases: Sequence[tuple[str, Case]], rounds: int, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All rows; `show` is told each as it is finished, and what is left out."""
    device = jax.devices()[0]
    target, rows = targets.of_kind(device.device_kind), []
    for operation, case in cases:
        if reason := left_out(case, device.platform == "cpu"):
            show(f"{operation} {case.name}: left out: {reason}")
            continue
        for implementation in case.implementations:
            for which in programs.PASSES:
                rows.append(
                    {
                        "operation": operation,
                        **bench_row(case, implementation, which, target, rounds),
                    }
                )
                show(format_row(rows[-1]))
    return rows


def main(argv: Sequence[str]) -> int:
    parser = programs.parser(
        "sngpt_jax.bench kernels",
        "Times every implementation of every operation on the device at hand, with errors and"
        " limits beside.",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}"
    )
    parser.add_argument(
        "--tune", action="store_true", help="first try block sizes, and write tuned/<device>.json"
    )
    parser.add_argument(
        "--markdown", default="", metavar="PATH", help="write the table for a document"
    )
    arguments = parser.parse_args(argv)
    cli.check_json(arguments.json)
    if arguments.markdown:
        check_writable(Path(arguments.markdown), "--markdown")
    cases = programs.select(arguments.operation, arguments.case)
    start, device = time.monotonic(), jax.devices()[0]
    show: Callable[[str], None] = (
        cli.progress if arguments.json == "-" else lambda line: print(line, flush=True)
    )
    report: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": " ".join(device.client.platform_version.split()),
        "jax": jax.__version__,
    }
    if arguments.tune:
        tune.tune_all(cases)
    report["rows"] = run_table(cases, QUICK_ROUNDS if arguments.quick else ROUNDS, show)
    report["seconds"] = round(time.monotonic() - start, 1)
    if arguments.markdown:
        write_text_atomic(Path(arguments.markdown), format_markdown(report) + "\n")
    cli.write_json(report, arguments.json)
    return 1 if any("failed" in row for row in report["rows"]) else 0


if __name__ == "__main__":
    cli.run(main)
