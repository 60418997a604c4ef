"""Every implementation of every operation, timed: `python -m sngpt_jax.bench kernels [OPERATION]`.

The least time that the device allows and the error stand beside each time. Arguments are fresh and
random, and together larger than the cache. A host processor runs only small cases.
"""

import functools
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
from sngpt_jax.bench import harness, tune
from sngpt_jax.bench.arguments import KernelsArguments

CPU_BYTES = 16 * 2**20  # arguments that a host processor handles in seconds
REFERENCE_ELEMENTS = 2**14  # elements of the output, in whole rows, that the slow reference makes
ROUNDS, QUICK_ROUNDS = 12, 4
TITLES = (
    *("case", "pass", "implementation", "µs", "quartiles"),
    *("limit µs", "of limit", "rms error", "max error"),
)
NOTES = """\
Times are medians per call. Errors are in units of the reference's root mean square. The
error of an output is against float64, the error of gradients against `xla` in full
float32. "≤" means that the host could not keep the device busy.
"""


def output_errors(
    case: Case, function: Callable[..., Any], arguments: harness.Arguments
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
    return harness.errors(output[rows][: len(expected)], expected)


@functools.lru_cache(maxsize=1)
def exact_gradients(case: Case, rounds: int) -> tuple[jax.Array, ...]:
    """The gradients at `error_arguments` by plain XLA, with full float32 products."""
    widened = [
        a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a
        for a in error_arguments(case, "forward_backward", rounds)
    ]
    with jax.default_matmul_precision("highest"):
        return jax.jit(programs.function(case, "xla", "forward_backward"))(*widened)[1]


def error_arguments(case: Case, which: str, rounds: int) -> harness.Arguments:
    """The arguments for errors: the same for all implementations, and none that are timed."""
    return harness.argument_sets(case, which, None)(rounds)[0]


def gradient_errors(case: Case, function: Callable[..., Any], rounds: int) -> dict[str, float]:
    """The errors of the gradient that is worst against `exact_gradients`."""
    gradients = function(*error_arguments(case, "forward_backward", rounds))[1]
    pairs = zip(gradients, exact_gradients(case, rounds), strict=True)
    return max((harness.errors(*pair) for pair in pairs), key=lambda error: error["rms"])


def bench_row(
    case: Case, implementation: str, which: str, target: Target | None, rounds: int
) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"case": case.name, "implementation": implementation, "pass": which}
    try:
        function = jax.jit(programs.function(case, implementation, which))
        sets = harness.argument_sets(case, which, target)
        quartiles, is_host_bound = harness.time_calls(function, sets, rounds)
        low, row["median_us"], high = (1e6 * seconds for seconds in quartiles)
        row["quartiles_us"] = [low, high]
        if jax.devices()[0].platform != "cpu":
            row["host_bound"] = is_host_bound
        if target is not None:
            row["limit_us"] = 1e6 * programs.limit(case, which, target)
            row["of_limit"] = row["limit_us"] / row["median_us"]
        if which == "forward":
            row["error"] = output_errors(case, function, error_arguments(case, which, rounds))
        else:
            row["gradient_error"] = gradient_errors(case, function, rounds)
    except dispatch.CannotServe as reason:
        row["cannot_serve"] = str(reason)
    except Exception as error:  # any failure, so that the other rows still run
        row["failed"] = programs.first_line(error)
    return row


def format_row(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    case, passes = f"{row['operation']} {row['case']}", row["pass"].replace("_", " + ")
    title = case, passes, row["implementation"]
    for key in ("cannot_serve", "failed"):
        if key in row:
            return harness.table_row((*title, key.replace("_", " "), row[key], *("",) * 4))
    low, high = row["quartiles_us"]
    error = row.get("error") or row["gradient_error"]
    cells = (
        "≤ " * row.get("host_bound", False) + f"{row['median_us']:,.1f}",
        f"{low:,.1f} to {high:,.1f}",
        f"{row['limit_us']:,.1f}" if "limit_us" in row else "",
        f"{row['of_limit']:.0%}" if "of_limit" in row else "",
        *(f"{error[kind]:.1e}" for kind in ("rms", "max")),
    )
    return harness.table_row((*title, *cells))


def format_markdown(report: dict[str, Any]) -> str:
    """The table for a document."""
    device = f"Device: {report['device']}; jax {report['jax']}; {report['platform_version']}.\n"
    rows = [format_row(row) + "\n" for row in report["rows"]]
    return "".join([device, NOTES, "\n", harness.table_head(TITLES), "\n", *rows])


def run_table(
    cases: Sequence[tuple[str, Case]], rounds: int, say: harness.Say
) -> list[dict[str, Any]]:
    """All rows. It says each row when it is finished, and the cases that are left out."""
    device = jax.devices()[0]
    target, rows = targets.of_kind(device.device_kind), []
    say(harness.table_head(TITLES))
    for operation, case in cases:
        size = programs.argument_bytes(case, "forward")
        if device.platform == "cpu" and size > CPU_BYTES:
            say(f"{operation} {case.name}: left out: {size >> 20} MiB are too many for a CPU")
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
        write_text_atomic(path, format_markdown(result))
    return result
