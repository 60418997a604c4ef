"""Every implementation of every operation, timed: `python -m sngpt_jax.bench kernels [cayley|xsa]`.

The least time that the device allows and the error stand beside each time. The error of an output
is against the float64 reference, the error of gradients against plain XLA in full float32.
Arguments are fresh and random, and together larger than the cache. A host processor runs only
small cases.
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
from sngpt_jax.ahead.cases import select
from sngpt_jax.ahead.targets import Target
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.bench import harness, timing, tune
from sngpt_jax.bench.arguments import KernelsArguments

CPU_BYTES = 16 * 2**20  # arguments that a host processor handles in seconds
REFERENCE_ELEMENTS = 2**14  # elements of the output, in whole rows, that the slow reference makes
ROUNDS, QUICK_ROUNDS = 12, 4
GRADIENTS = "forward_backward"


def output_errors(
    case: Case, function: Callable[..., Any], arguments: timing.Arguments
) -> dict[str, float]:
    """The errors of some rows of the output against the float64 reference of those rows.

    Rows run along the first axis of the output, and of the arguments with as many axes and rows. A
    reference may return only the first of its rows.
    """
    output = function(*arguments)
    count = max(1, REFERENCE_ELEMENTS * len(output) // output.size)
    rows = np.unique(np.linspace(0, len(output) - 1, count).astype(int))
    has_rows = [a.ndim == output.ndim and len(a) == len(output) for a in arguments]
    pairs = zip(arguments, has_rows, strict=True)
    expected = case.reference(*(np.asarray(a[rows] if has else a) for a, has in pairs))
    return timing.errors(output[rows][: len(expected)], expected)


@functools.lru_cache(maxsize=1)
def exact_gradients(case: Case, rounds: int) -> tuple[jax.Array, ...]:
    """The gradients at `error_arguments` by plain XLA, with full float32 products."""
    widened = [
        a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a
        for a in error_arguments(case, GRADIENTS, rounds)
    ]
    with jax.default_matmul_precision("highest"):
        return jax.jit(programs.function(case, "xla", GRADIENTS))(*widened)[1]


def error_arguments(case: Case, which: str, rounds: int) -> timing.Arguments:
    """The arguments for errors: the same for all implementations, and none that are timed."""
    return timing.argument_sets(case, which, None)(rounds)[0]


def gradient_errors(case: Case, function: Callable[..., Any], rounds: int) -> dict[str, float]:
    """The errors of the gradient that is worst against `exact_gradients`."""
    gradients = function(*error_arguments(case, GRADIENTS, rounds))[1]
    pairs = zip(gradients, exact_gradients(case, rounds), strict=True)
    return max((timing.errors(*pair) for pair in pairs), key=lambda error: error["rms"])


def bench_row(
    case: Case, implementation: str, which: str, target: Target | None, rounds: int
) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"case": case.name, "implementation": implementation, "pass": which}
    try:
        function = jax.jit(programs.function(case, implementation, which))
        taken = timing.time_calls(function, timing.argument_sets(case, which, target), rounds)
        low, row["median_us"], high = (1e6 * seconds for seconds in taken.quartiles)
        row["quartiles_us"] = [low, high]
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
    except Exception as error:  # any failure, so that the other rows still run
        row["failed"] = programs.first_line(error)
    return row


def left_out(case: Case, on_cpu: bool) -> str:
    """The reason not to run the case on this device; "" if it runs."""
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in case.abstract())
    if on_cpu and size > CPU_BYTES:
        return f"its {size / 2**20:.0f} MiB of arguments are too many for a host processor"
    return ""


_TITLES = (
    *("case", "pass", "implementation", "µs", "quartiles"),
    *("limit µs", "of limit", "rms error", "max error"),
)
_NO_TIME = {"cannot_serve": "cannot serve", "failed": "failed"}  # as the table says it


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    title = (
        f"{row['operation']} {row['case']}",
        row["pass"].replace("_", " + "),
        row["implementation"],
    )
    for key, words in _NO_TIME.items():
        if key in row:
            return (*title, words, row[key], *("",) * 4)
    low, high = row["quartiles_us"]
    error = row.get("error") or row.get("gradient_error") or {}
    return (
        *title,
        "≤ " * row.get("host_bound", False) + f"{row['median_us']:,.1f}",
        f"{low:,.1f} to {high:,.1f}",
        f"{row['limit_us']:,.1f}" if "limit_us" in row else "",
        f"{row['of_limit']:.0%}" if "of_limit" in row else "",
        *(f"{error[kind]:.1e}" if kind in error else "" for kind in ("rms", "max")),
    )


def format_row(row: dict[str, Any]) -> str:
    """A row in one line."""
    *title, taken, spread, limit, share, rms, largest = _cells(row)
    if _NO_TIME.keys() & row.keys():
        return f"{', '.join(title)}: {taken}: {spread}"
    of_limit = f", {share} of the limit {limit} µs" if limit else ""
    error = f", error {rms} rms, {largest} max" if rms else ""
    return f"{', '.join(title)}: {taken} µs ({spread}){of_limit}{error}"


def format_markdown(report: dict[str, Any]) -> str:
    """The table for a document."""
    lines = [
        f"Device: {report['device']}; jax {report['jax']}; {report['platform_version']}.",
        "Times are medians per call. Errors are in units of the reference's root mean square. The",
        "error of an output is against float64, the error of gradients against `xla` in full",
        'float32. "≤" means that the host could not keep the device busy.',
        "",
        harness.markdown_head(_TITLES),
    ]
    return "\n".join(lines + [harness.markdown_row(_cells(row)) for row in report["rows"]])


def run_table(
    cases: Sequence[tuple[str, Case]], rounds: int, say: harness.Say
) -> list[dict[str, Any]]:
    """All rows. It says each row when it is finished, and the cases that are left out."""
    device = jax.devices()[0]
    target, rows = targets.of_kind(device.device_kind), []
    for operation, case in cases:
        if reason := left_out(case, device.platform == "cpu"):
            say(f"{operation} {case.name}: left out: {reason}")
            continue
        for implementation in case.implementations:
            for which in programs.PASSES:
                row = bench_row(case, implementation, which, target, rounds)
                rows.append({"operation": operation, **row})
                say(format_row(rows[-1]))
    return rows


def measure(arguments: KernelsArguments, say: harness.Say) -> dict[str, Any]:
    """The rows of the chosen cases, after the tuning if it was asked for."""
    path = Path(arguments.markdown)
    if arguments.markdown:
        check_writable(path, "--markdown")
    cases, start, result = select(arguments), time.monotonic(), harness.environment()
    if arguments.tune:
        tune.tune_all(cases)
    result["rows"] = run_table(cases, QUICK_ROUNDS if arguments.quick else ROUNDS, say)
    result["seconds"] = round(time.monotonic() - start, 1)
    if arguments.markdown:
        write_text_atomic(path, format_markdown(result) + "\n")
    return result
