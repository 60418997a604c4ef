"""Everything worth knowing about a GPU in a few minutes: `bench first-light --out first_light`.

The parts stand in the order of their worth. Each runs in a process of its own with a limit in
seconds, and its results are written as it goes. A part that fails or runs out of time does not end
the rest. `first_light_parts` holds the parts, `pack` what a machine without a network needs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.bench import first_light_parts, pack
from sngpt_jax.bench.arguments import FirstLightArguments
from sngpt_jax.bench.harness import Say, table_head, table_row

ROOT = Path(__file__).parents[2]
MINUTES = 8  # the time that the parts' seconds are for
LEAST_SECONDS = 15  # of those 8 minutes: a part with less left compiles and shows nothing
PROVEN, FAILED, LATE, SKIPPED = "proven", "failed", "out of time", "skipped"


@dataclass(frozen=True)
class Part:
    """A bounded part of first light."""

    name: str
    seconds: float  # its limit if the whole has 8 minutes
    proves: str
    command: tuple[str, ...]  # gets --out FILE, where it keeps its result as it goes


def parts(device: str, data: str = "") -> tuple[Part, ...]:
    """All parts, the most worthy first."""
    module = (sys.executable, "-m", "sngpt_jax.bench.first_light_parts")

    def part(name: str, seconds: float, proves: str, *arguments: str) -> Part:
        return Part(name, seconds, proves, (*module, *arguments, "--device", device))

    def step(recipe: str, seconds: float) -> Part:
        proves = f"20 steps of {recipe} with the kernels have the losses of plain XLA"
        return part(f"step {recipe}", seconds, proves, "step", "--recipe", recipe)

    first, *others = first_light_parts.RECIPES[device]
    second, *others = others
    where = ("--data", data) if data else ()
    right = "every kernel's values and gradients are those of float32 XLA"
    compared = "the same model trains in PyTorch, and its speed stands beside ours"
    same = "two runs are equal bit for bit, and so is a resumed one; the trace opens"
    return (
        part("parity", 60, right, "parity"),
        step(first, 75),
        step(second, 75),
        part("kernels", 60, "every implementation has a time, with its limit", "kernels"),
        part("tune", 30, "the choice tables are measured", "tune"),
        part("torch", 90, compared, "torch", "--recipe", first_light_parts.COMPARED[device]),
        part("train", 60, same, "train", *where),
        *(step(recipe, 75) for recipe in others),
    )


def run_part(part: Part, seconds: float, out: Path, device: str) -> dict[str, Any]:
    """Runs a part for at most so many seconds. Returns its row; its output is in a log."""
    stem = part.name.replace(" ", "_")
    result, log = out / f"{stem}.json", out / f"{stem}.log"
    result.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu",  # an error without a GPU
        "JAX_COMPILATION_CACHE_DIR": str(out.resolve() / "xla"),  # parts share programs
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # PyTorch needs memory beside jax
    }
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*part.command, "--out", str(result)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its children end with it
        )
        try:
            while process.poll() is None and time.monotonic() < start + seconds:
                time.sleep(0.05)
            late = process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    row = {"part": part.name, "proves": part.proves, "result": found}
    row["seconds"] = round(time.monotonic() - start, 1)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    problem = found.get("problem", "")
    if process.returncode and not late:
        problem = problem or (said[-1] if said else f"it ended with {process.returncode}")
    if problem:
        return row | {"state": FAILED, FAILED: problem}
    if late:
        return row | {"state": LATE, "reason": f"it had {seconds:.0f} s"}
    if "skipped" in found:
        return row | {"state": SKIPPED, "reason": found["skipped"]}
    return row | {"state": PROVEN}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The tables for a document: what was proven, and what each part measured."""
    lines = ["# First light", "", table_head(("part", "state", "seconds", "what it proves"))]
    for row in rows:
        why = row.get(FAILED) or row.get("reason")
        state = row["state"] + (f": {why}".replace("|", "/") if why else "")
        lines.append(table_row((row["part"], state, f"{row['seconds']:g}", row["proves"])))
    for row in rows:
        if text := row["result"].get("markdown"):
            lines += ["", f"## {row['part']}", "", text]
    return "\n".join(lines) + "\n"


def run(
    chosen: Sequence[Part], *, out: Path, minutes: float, device: str, say: Say
) -> dict[str, Any]:
    """Runs the parts in turn, and writes `first_light.json` and `.md` into `out` after each."""
    scale, end = minutes / MINUTES, time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    for part in chosen:
        left = end - time.monotonic()
        if left < LEAST_SECONDS * scale:
            reason = "no time was left"
            row = {"part": part.name, "proves": part.proves, "result": {}, "seconds": 0.0}
            rows.append(row | {"state": SKIPPED, "reason": reason})
        else:
            rows.append(run_part(part, min(scale * part.seconds, left), out, device))
        row = rows[-1]
        why = row.get(FAILED) or row.get("reason")
        say(f"{part.name}: {row['state']}, {row['seconds']:g} s" + (f": {why}" if why else ""))
        result = {"device": device, "minutes": minutes, "rows": rows}
        write_text_atomic(out / "first_light.json", json.dumps(result, indent=2) + "\n")
        write_text_atomic(out / "first_light.md", markdown(rows))
    for state in (PROVEN, FAILED, LATE, SKIPPED):
        if names := [row["part"] for row in rows if row["state"] == state]:
            say(f"{state}: {', '.join(names)}")
    say(f"tables: {out / 'first_light.md'}")
    return result


def measure(arguments: FirstLightArguments, say: Say) -> dict[str, Any]:
    """Runs all parts, or makes the pack."""
    if arguments.pack:
        return {"rows": [], "pack": pack.make(Path(arguments.pack), arguments.python, say)}
    if arguments.minutes <= 0:
        raise UserError(f"--minutes {arguments.minutes:g}: expected more than 0")
    out = Path(arguments.out)
    check_writable(out / "first_light.md", "--out")
    chosen = parts(arguments.device, arguments.data)
    device, minutes = arguments.device, arguments.minutes
    return run(chosen, out=out, minutes=minutes, device=device, say=say)
