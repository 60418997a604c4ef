"""Text to token shards: `python -m sngpt_jax.prepare --source … --tokenizer … --out DIR`."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import tyro

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.data.encode import usable_cpus
from sngpt_jax.data.manifest import Manifest, ShardEntry, verify
from sngpt_jax.data.preparation import Executor, fetch_golf, prepare_on, tokenizer_entry
from sngpt_jax.data.spec import COMMAND, PrepareSpec

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class Arguments(PrepareSpec):
    """Converts text to token shards. `--verify DIR` alone compares every checksum of a finished
    folder.
    """

    workers: int = usable_cpus()  # processes that tokenize, or tasks of a Slurm job at a time
    # processes: one process reads for all workers; local: each reads files of its own; slurm: jobs
    # of a cluster do so
    executor: Executor = "processes"
    train_shards: int = 80  # number of training shards to download from a golf source
    json: Json = ""
    quiet: Quiet = False


@dataclass(frozen=True)
class VerifyArguments:
    """Compares every checksum of a finished folder."""

    verify: str  # the folder
    json: Json = ""
    quiet: Quiet = False


def _split_summary(entries: Sequence[ShardEntry]) -> dict[str, int]:
    units = ("tokens", "documents", "bytes")
    sums = {unit: sum(getattr(entry, unit) for entry in entries) for unit in units}
    return {"shards": len(entries), **sums}


def _summary(out: str, manifest: Manifest) -> dict[str, Any]:
    splits = {"train": _split_summary(manifest.train), "val": _split_summary(manifest.val)}
    return {"dir": out, "tokenizer": asdict(manifest.tokenizer), **splits}


def _golf_summary(spec: PrepareSpec, train_shards: int) -> dict[str, Any]:
    data = fetch_golf(spec, train_shards)
    splits = {
        name: {"shards": len(stream.shards), "tokens": len(stream)}
        for name, stream in (("train", data.train), ("val", data.val))
    }
    return {"dir": spec.out, "tokenizer": asdict(tokenizer_entry(data.tokenizer)), **splits}


def _show(summary: dict[str, Any], title: str, json: str) -> int:
    """Shows what the folder holds and the command that trains on it, or writes it as JSON."""
    cli.write_json(summary, json)
    if json == "-":
        return 0
    rows = [("data", summary["dir"])]
    for name, split in (("training", summary["train"]), ("validation", summary["val"])):
        counts = [f"{split[unit]:,} {unit}" for unit in split if unit != "shards"]
        shards = f"{split['shards']:,} shard{'s' * (split['shards'] != 1)}"
        per_token = (
            f", {split['bytes'] / split['tokens']:.3f} bytes/token" if split.get("bytes") else ""
        )
        rows.append((name, f"{', '.join(counts)} in {shards}{per_token}"))
    tokenizer = summary["tokenizer"]
    rows.append(("tokenizer", f"{tokenizer['file']}, {tokenizer['vocab_size']:,} tokens"))
    train = cli.command("sngpt_jax.train", "--config", "RECIPE", "--data.dir", summary["dir"])
    terminal.show_result(title, rows, [train])
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status. Raises `UserError`."""
    argv = cli.expand_json(argv)
    kind: Any = VerifyArguments if any(a.split("=")[0] == "--verify" for a in argv) else Arguments
    arguments = tyro.cli(kind, args=argv, prog=f"python -m {COMMAND}")
    cli.log_to_stderr(arguments.quiet)
    if isinstance(arguments, VerifyArguments):
        logger.info(f"{arguments.verify}: comparing the checksum of every file")
        summary = _summary(arguments.verify, verify(arguments.verify))
        return _show(summary, "verified", arguments.json)
    spec = PrepareSpec(**{x.name: getattr(arguments, x.name) for x in fields(PrepareSpec)})
    if spec.source == "golf" or spec.source.startswith("golf:"):
        if arguments.executor != "processes":
            raise UserError(f"--source {spec.source} is already tokens; it takes no --executor")
        return _show(_golf_summary(spec, arguments.train_shards), "prepared", arguments.json)
    made = prepare_on(spec, arguments.workers, arguments.executor)
    if isinstance(made, Manifest):
        return _show(_summary(spec.out, made), "prepared", arguments.json)
    cli.write_json({"dir": spec.out, "submitted": asdict(made)}, arguments.json)
    if arguments.json != "-":
        array = f"job {made.array_job} encodes {made.parts} parts, then " if made.array_job else ""
        print(
            f"{spec.out}: {array}job {made.merge_job} writes the shards; if one fails, run the same"
            " command again to resume"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
