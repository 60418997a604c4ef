"""All scenarios, and the table of what came of them."""

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from sngpt_jax.base.files import write_text_atomic
from tests import tiny_run
from tests.faults import damage, disks, kills, numbers, signals
from tests.faults.lab import Lab, Row, Scenario, described

SCENARIOS: tuple[Scenario, ...] = (
    kills.of_trainings,
    kills.of_preparations,
    kills.of_exports,
    kills.of_one_of_two_processes,
    signals.asked_to_stop,
    signals.interrupted_while_starting,
    disks.full_in_training,
    disks.full_for_output,
    disks.full_in_preparation,
    disks.full_in_export,
    disks.unwritable,
    damage.a_byte_of_the_latest_checkpoint,
    damage.a_byte_of_every_checkpoint,
    damage.a_missing_shard,
    damage.a_changed_shard,
    damage.other_data,
    damage.another_tokenizer,
    numbers.nan_stops,
    numbers.nan_is_skipped,
    numbers.nan_to_the_limit,
    numbers.clock,
)
BEGIN, END = "<!-- begin: tests.faults -->\n", "<!-- end: tests.faults -->\n"


def name_of(scenario: Scenario) -> str:
    return f"{scenario.__module__.rpartition('.')[2]}.{scenario.__name__}"


HEAD = [
    "| fault | what happens | message | exit status | tried | lost |",
    "|---|---|---|---|---|---|",
]


def line(row: Row) -> str:
    """The row as Markdown."""
    message = f"`{row.message}`" if row.message else "none"
    return f"| {row.fault} | {row.happens} | {message} | {row.status} | {row.tried} | {row.lost} |"


def write_between(path: Path, lines: dict[int, str], count: int) -> None:
    """Puts the `lines`, by their places among `count`, into the table between a page's marks."""
    before, begin, rest = path.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path}: has no lines {BEGIN.strip()} and {END.strip()}")
    there = old.splitlines()[len(HEAD) :]
    if len(lines) < count and len(there) != count:
        raise SystemExit(f"{path}: the table has not {count} lines; run all scenarios")
    new = [lines.get(i) or there[i] for i in range(count)]
    write_text_atomic(path, before + begin + "\n".join([*HEAD, *new]) + "\n" + end + after)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    kills_of = "of trainings and of preparations; a quarter as many of exports"
    parser.add_argument("--kills", type=int, default=20, help=kills_of)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is damaged")
    parser.add_argument("--only", default="", help="starts of scenarios' names, comma between them")
    parser.add_argument("--markdown", type=Path, help="page with the table to fill in")
    arguments = parser.parse_args()
    tiny_run.heed_signals()
    wanted, names = tuple(arguments.only.split(",")), [name_of(x) for x in SCENARIOS]
    for start in wanted:
        if not any(name.startswith(start) for name in names):
            parser.error(f"--only: no scenario begins with {start}: {', '.join(names)}")
    lines: dict[int, str] = {}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = Lab(Path(folder), arguments.kills, random.Random())
        for place, (name, scenario) in enumerate(zip(names, SCENARIOS, strict=True)):
            if not name.startswith(wanted):
                continue
            lab.rng.seed(f"{arguments.seed} {name}")
            start = time.monotonic()
            try:
                row = described(scenario(lab), lab)
                lines[place] = line(row)
                seconds = time.monotonic() - start
                print(f"{name}: {row.tried} tried, {seconds:.0f} s: {row.message}", flush=True)
            except Exception as error:
                failed += 1
                where = traceback.extract_tb(error.__traceback__)[1:]
                at = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in where)
                what = f"{type(error).__name__}: {error}"
                print(f"{name}: FAILED at {at}: {what}"[:3000], flush=True)
    if arguments.markdown and not failed:
        write_between(arguments.markdown, lines, len(SCENARIOS))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
