"""Text to token shards: `python -m sngpt_jax.prepare --source … --tokenizer … --out DIR`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import PathText
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.data.encode import usable_cpus
from sngpt_jax.data.golf import fetch_golf
from sngpt_jax.data.manifest import Manifest, ShardEntry, TokenizerEntry, lost_share, verify
from sngpt_jax.data.preparation import Executor, prepare_on
from sngpt_jax.data.spec import COMMAND, PrepareSpec

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class Arguments(PrepareSpec):
    """Converts text to token shards. `--verify DIR` alone compares every checksum of a folder."""

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

    verify: PathText  # the folder
    json: Json = ""
    quiet: Quiet = False


def _counts(entries: Sequence[ShardEntry]) -> dict[str, float]:
    units = ("tokens", "documents", "text_bytes", "golf_bytes", "source_bytes", "lossy_documents")
    sums: dict[str, float] = {}
    for unit in units:
        values = [getattr(entry, unit) for entry in entries]
        if None not in values:  # as in a folder of format 1
            sums[unit] = sum(values)
    if "source_bytes" in sums:
        sums["lost"] = lost_share(entries)
    return {"shards": len(entries), **sums}


def _rule(manifest: Manifest) -> str:
    """How validation and training text were told apart."""
    origin, separation = manifest.origin, manifest.separation
    if origin.val_source:
        return "validation has a source of its own"
    if origin.val_docs:
        return f"the first {origin.val_docs:,} documents are held out"
    if separation and separation.cut:
        held_out = "what follows is held out"
        return f"the source is one document; after {separation.cut:,} characters {held_out}"
    share = f"{origin.val_fraction:.4g} of the documents are held out"
    return f"{share}, drawn by --split-seed {origin.split_seed}"


def _show(
    title: str,
    out: str,
    tokenizer: TokenizerEntry,
    train: Mapping[str, float],
    val: Mapping[str, float],
    json: str,
    manifest: Manifest | None = None,
) -> int:
    """Shows what the folder holds and the command that trains on it, or writes JSON."""
    summary = {"dir": out, "tokenizer": asdict(tokenizer), "train": train, "val": val}
    dropped = manifest.separation.dropped if manifest and manifest.separation else 0
    cli.write_json(summary | ({"dropped": dropped} if manifest else {}), json)
    if json == "-":
        return 0
    rows = [("data", out)]
    for name, split in (("training", train), ("validation", val)):
        counts = [f"{split[unit]:,} {unit}" for unit in ("tokens", "documents") if unit in split]
        shards = f"{split['shards']:,} shard{'s' * (split['shards'] != 1)}"
        size = split.get("text_bytes", split.get("golf_bytes"))
        if size is not None:
            counts.append(f"{size:,} bytes")
            shards += f", {size / split['tokens']:.3f} bytes/token"
        rows.append((name, f"{', '.join(counts)} in {shards}"))
        if split.get("lossy_documents"):
            changed = f"{split['lossy_documents']:,} documents are not kept exactly"
            rows.append(("", f"{changed}; {split['lost']:.2%} of the text's bytes are lost"))
    rows.append(("tokenizer", f"{tokenizer.file}, {tokenizer.vocab_size:,} tokens"))
    if manifest:
        rows.append(("split", _rule(manifest)))
    if dropped:
        why = "training documents that validation has, too; --allow-overlap keeps them"
        rows.append(("left out", f"{dropped:,} {why}"))
    recipe, run = "quickstart" if manifest else "golf_baseline", f"runs/{Path(out).resolve().name}"
    options = ("--config", recipe, "--data.dir", out, "--run-dir", run)
    terminal.show_result(title, rows, [cli.command("sngpt_jax.train", *options)])
    return 0


def _show_manifest(title: str, out: str, manifest: Manifest, json: str) -> int:
    train, val = _counts(manifest.train), _counts(manifest.val)
    return _show(title, out, manifest.tokenizer, train, val, json, manifest)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    argv = cli.expand_json(argv)
    kind: Any = VerifyArguments if any(a.split("=")[0] == "--verify" for a in argv) else Arguments
    arguments = parse(kind, argv, program=f"python -m {COMMAND}")
    cli.log_to_stderr(arguments.quiet)
    if isinstance(arguments, VerifyArguments):
        logger.info(f"{arguments.verify}: comparing the checksum of every file")
        manifest = verify(arguments.verify)
        return _show_manifest("verified", arguments.verify, manifest, arguments.json)
    spec = PrepareSpec(**{x.name: getattr(arguments, x.name) for x in fields(PrepareSpec)})
    if spec.source == "golf" or spec.source.startswith("golf:"):
        if arguments.executor != "processes":
            raise UserError(f"--source {spec.source} is already tokens; it takes no --executor")
        data = fetch_golf(spec, arguments.train_shards)
        train, val = ({"shards": len(x.shards), "tokens": len(x)} for x in (data.train, data.val))
        return _show("prepared", spec.out, data.tokenizer.entry(), train, val, arguments.json)
    made = prepare_on(spec, arguments.workers, arguments.executor)
    if isinstance(made, Manifest):
        return _show_manifest("prepared", spec.out, made, arguments.json)
    cli.write_json({"dir": spec.out, "submitted": asdict(made)}, arguments.json)
    if arguments.json != "-":
        array = f"job {made.array_job} encodes {made.parts} parts, then " if made.array_job else ""
        resume = "if one fails, run the same command again to resume"
        print(f"{spec.out}: {array}job {made.merge_job} writes the shards; {resume}")
    return 0


if __name__ == "__main__":
    cli.run(main)
