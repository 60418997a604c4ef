"""Text to token shards: `python -m sngpt_jax.prepare --source … --tokenizer … --out DIR`."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.data.manifest import Manifest, verify
from sngpt_jax.data.parts import Submitted
from sngpt_jax.data.preparation import Executor, fetch_golf, prepare_on, tokenizer_entry
from sngpt_jax.data.shards import Dataset
from sngpt_jax.data.spec import COMMAND, PrepareSpec

logger = logging.getLogger("sngpt_jax")


def _cpus() -> int:
    """The processors that this process may use, which a batch scheduler limits; macOS has no such
    set.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Arguments(PrepareSpec):
    """Text to token shards. `--verify DIR` alone reads a finished folder back and compares every
    checksum.
    """

    workers: int = _cpus()  # processes that tokenize, or tasks at a time of a Slurm job
    # local: each process reads files of its own; slurm: so do a cluster's jobs
    executor: Executor = "processes"
    train_shards: int = 80  # of a golf source: how many of its training shards to fetch
    json: Json = ""
    quiet: Quiet = False


@dataclass(frozen=True)
class VerifyArguments:
    """Reads a finished folder back and compares every checksum."""

    verify: str  # the folder
    json: Json = ""
    quiet: Quiet = False


def _summary(out: str, manifest: Manifest) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    for split, entries in (("train", manifest.train), ("val", manifest.val)):
        sums = {
            key: sum(getattr(entry, key) for entry in entries)
            for key in ("tokens", "documents", "bytes")
        }
        totals[split] = {"shards": len(entries), **sums}
    return {"dir": out, "tokenizer": asdict(manifest.tokenizer), **totals}


def _golf_summary(out: str, data: Dataset) -> dict[str, Any]:
    totals = {
        name: {"shards": len(s.shards), "tokens": len(s)}
        for name, s in (("train", data.train), ("val", data.val))
    }
    return {"dir": out, "tokenizer": asdict(tokenizer_entry(data.tokenizer)), **totals}


def _show_submitted(out: str, jobs: Submitted, json: str) -> int:
    if json != "-":
        encoding = (
            f"job {jobs.array_job} encodes {jobs.parts} parts, then " if jobs.array_job else ""
        )
        print(
            f"{out}: {encoding}job {jobs.merge_job} writes the shards; if one fails, run the same"
            " command again to go on"
        )
    cli.write_json({"dir": out, "submitted": asdict(jobs)}, json)
    return 0


def _show_summary(summary: dict[str, Any], title: str) -> None:
    """What lies in the folder, and the command that trains on it."""
    rows = [("data", summary["dir"])]
    for name, split in (("training", summary["train"]), ("validation", summary["val"])):
        counts = ", ".join(
            f"{split[unit]:,} {unit}" for unit in ("tokens", "documents", "bytes") if unit in split
        )
        per_token = (
            f", {split['bytes'] / split['tokens']:.3f} bytes/token"
            if split.get("bytes") and split["tokens"]
            else ""
        )
        rows.append(
            (
                name,
                f"{counts} in {split['shards']:,} shard{'s' * (split['shards'] != 1)}{per_token}",
            )
        )
    rows.append(
        (
            "tokenizer",
            f"{summary['tokenizer']['file']}, {summary['tokenizer']['vocab_size']:,} tokens",
        )
    )
    terminal.show_result(
        title,
        rows,
        [cli.command("sngpt_jax.train", "--config", "RECIPE", "--data.dir", summary["dir"])],
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status. Raises `UserError`."""
    argv = cli.expand_json(argv)
    kind: Any = VerifyArguments if any(a.split("=")[0] == "--verify" for a in argv) else Arguments
    arguments = tyro.cli(kind, args=argv, prog=f"python -m {COMMAND}")
    cli.log_to_stderr(arguments.quiet)
    if isinstance(arguments, VerifyArguments):
        logger.info(f"{arguments.verify}: reading every file back")
        summary = _summary(arguments.verify, verify(arguments.verify))
    else:
        spec = PrepareSpec(
            **{key: getattr(arguments, key) for key in PrepareSpec.__dataclass_fields__}
        )
        if spec.source == "golf" or spec.source.startswith("golf:"):
            if arguments.executor != "processes":
                raise UserError(f"--source {spec.source} is already tokens; it takes no --executor")
            summary = _golf_summary(spec.out, fetch_golf(spec, arguments.train_shards))
        else:
            made = prepare_on(spec, arguments.workers, arguments.executor)
            if not isinstance(made, Manifest):
                return _show_submitted(spec.out, made, arguments.json)
            summary = _summary(spec.out, made)
    if arguments.json != "-":
        _show_summary(summary, "verified" if isinstance(arguments, VerifyArguments) else "prepared")
    cli.write_json(summary, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
