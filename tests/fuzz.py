"""Files of every format, damaged at random: each is read to something whole, or refused in one
line that names the file.

    python -m tests.fuzz --examples 20000 [--formats config.json,npz] [--seed 0] [--markdown]

Prints a row per format. There are to be no other exceptions. `tests/test_fuzz.py` does this with
few examples; `tests/artifact/test_fuzz.py` damages what follows an artifact's header.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.policy import is_exported
from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh, path_name
from sngpt_jax.config import Config, DataConfig, ModelConfig, OptimConfig, to_json
from sngpt_jax.config import file as config_file
from sngpt_jax.data import manifest, shards, tokenizer
from sngpt_jax.data.golf import _entry as golf_entry
from sngpt_jax.data.shards import Shard, TokenStream
from sngpt_jax.data.tokenizer import NO_CORRECTIONS
from sngpt_jax.model.forward import abstract_variables
from sngpt_jax.run import checkpoint, environment
from sngpt_jax.run.directory import Summary, read_summary, write_summary
from sngpt_jax.run.metrics import read_metrics
from sngpt_jax.training.loop import Position, Validation
from sngpt_jax.weights.state_dict_files import read_state_dict
from sngpt_jax.weights.trained_model import from_artifact
from tests import mutations, tiny_run

SLOWEST = 1.0  # seconds that one file may take
MOST_MEMORY = 200 * 2**20  # bytes that one file may take, of Python's and numpy's

Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Format:
    """A kind of file, and what reads it."""

    name: str
    target: Path  # a whole file of the kind, with what it needs beside it
    read: Callable[[], Any]  # of that place; asserts that what it accepts is whole
    mutate: Mutate
    per: int = 1  # so many times fewer examples, where what is accepted is then computed with


@dataclass
class Tally:
    examples: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    memory: int = 0
    others: list[str] = dataclasses.field(default_factory=list)


def binary(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 2])):
        content = rng.choice(mutations.BYTES)(rng, content)
    return content


def numbers(width: int, size: int) -> Mutate:
    """Binary mutations, and extremes in the little-endian integers of the first `size` bytes."""

    def mutate(rng: random.Random, content: bytes) -> bytes:
        if rng.random() < 0.5:
            return binary(rng, content)
        at = rng.randrange(size // width) * width
        value = rng.choice([0, 1, -1, 2**31 - 1, -(2**31), 2**16, rng.randrange(2**31), 299, 301])
        changed = (value % 2 ** (8 * width)).to_bytes(width, "little")
        return content[:at] + changed + content[at + width :]

    return mutate


# ---------------------------------------- formats


def make_formats(folder: Path) -> list[Format]:
    """One of each kind, made in `folder`."""
    tiny_run.make(folder)
    data = folder / "data"
    of_text = [*of_data(folder, data), *of_runs(folder), *of_tokenizers(folder, data)]
    return [*of_text, of_artifact(folder), *of_state_dicts(folder)]


def of_data(folder: Path, data: Path) -> list[Format]:
    names = ("a_train_000000.bin", "extra.npy", "journal", "golf.json")
    shard, extra, progress, golf = (folder / name for name in names)
    shards.write_shard(shard, np.random.default_rng(0).integers(0, 320, 300).astype(np.uint16))
    np.save(extra, np.array([[3, 1, 1, 1, 0], [5, -2, 0, 0, 0], [299, 7, 6, 7, 1]], np.int64))

    def read_shard() -> None:
        stream = TokenStream((Shard(shard, shards.open_shard(shard), NO_CORRECTIONS),), 320)
        assert stream.take(0, len(stream)).max() < 320

    def read_extra() -> None:
        rows = shards.open_extra(extra, 300, 5)
        assert rows.dtype == np.int64 and rows.shape[1] == 5
        assert (np.diff(rows[:, 0].astype(object)) > 0).all()

    def read_manifest() -> None:
        found = shards.open_dataset(data, 320)
        assert found.manifest
        assert sum(entry.tokens for entry in found.manifest.train) == len(found.train)

    whole = manifest.load_manifest(data)
    split = manifest.SplitJournal(whole.train, 3, 7)
    journal = manifest.Journal(2, whole.origin, whole.tokenizer, split)
    progress.mkdir()
    manifest.save(journal, progress)
    for entry in whole.train:
        (progress / entry.name).write_bytes((data / entry.name).read_bytes())

    def read_progress() -> None:
        found = manifest.load_journal(progress)
        shards.open_entries(progress, found.train.shards)
        again = typed_json.loads(json.dumps(dataclasses.asdict(found)).encode())
        assert typed_json.parse(manifest.Journal, again, "", UserError) == found

    counts = {"files_train": 3, "files_val": 1}
    entry = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp", "stats": counts}
    named = {"name": "sp", "model_path": "tokenizers/a.model"}
    golf.write_text(json.dumps({"datasets": [entry], "tokenizers": [named]}))
    return [
        Format("shard", shard, read_shard, numbers(4, 24)),
        Format("byte corrections (npy)", extra, read_extra, binary),
        Format("manifest.json", data / manifest.MANIFEST, read_manifest, mutations.of_json),
        Format("progress.json", progress / manifest.PROGRESS, read_progress, mutations.of_json),
        Format("published manifest", golf, lambda: golf_entry(golf, 1024), mutations.of_json),
    ]


def of_runs(folder: Path) -> list[Format]:
    run = folder / "run"
    run.mkdir()
    config, metrics = run / "config.json", run / "metrics.jsonl"
    config.write_text(to_json(Config(optim=OptimConfig(warmdown_steps=10))))
    numbers = (20, 1000, 2.5, 1.5, 100, 2.25, None, 3.5, 1e4, 5000)
    write_summary(run, Summary(*numbers, "checkpoints/00000020", None, 1.25))
    lines = [{"step": i, "train_loss": 3.5 / (i + 1), "lr": 0.01, "note": "x"} for i in range(6)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read_config() -> None:
        found = config_file.read(config)
        config.write_text(to_json(found))
        assert config_file.read(config) == found

    def read_run_summary() -> None:
        found = read_summary(run)
        assert found and isinstance(found.val_bpb, float) and isinstance(found.steps, int)

    def read_run_metrics() -> None:
        assert all(np.isfinite(record["step"]) for record in read_metrics(metrics))

    starts = (json.dumps(environment.environment(step)) + "\n" for step in (0, 10))
    environment.path(run).write_text("".join(starts))

    def read_starts() -> None:
        assert all(isinstance(start, dict) for start in environment.read(run))

    checkpoints, state = run / "checkpoints", {"params": {"w": jax.numpy.arange(6.0)}}
    position = Position(
        elapsed_seconds=2.5,
        first=Validation(0, 6.0, 3.0, 99),
        averages={"ema": 1.5},
        data={"step": 3},
    )
    logging.getLogger("absl").setLevel(logging.ERROR)
    with checkpoint.Checkpointer(checkpoints, keep=1) as saving:
        saving.save(3, state, dataclasses.asdict(position), value=2.5)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def read_record() -> None:
        found = checkpoint.restore(checkpoints, abstract, 3)
        assert found and np.array_equal(found.state["params"]["w"], np.arange(6.0))
        assert isinstance(Position.from_json(found.extra, str(checkpoints)).elapsed_seconds, float)

    return [
        Format("config.json", config, read_config, mutations.of_json),
        Format("summary.json", run / "summary.json", read_run_summary, mutations.of_json),
        Format("metrics.jsonl", metrics, read_run_metrics, of_lines),
        Format("environment.jsonl", environment.path(run), read_starts, of_lines),
        Format("checkpoint record", checkpoints / "00000003.json", read_record, of_record, per=4),
    ]


def of_lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines) - 1)
    lines[at] = mutations.of_json(rng, lines[at])
    return b"\n".join(lines)


def of_record(rng: random.Random, content: bytes) -> bytes:
    """Every second one with its right hash, so that what follows the hash is tried."""
    if rng.random() < 0.5:
        return mutations.of_json(rng, content)
    body = mutations.of_json(rng, json.dumps(json.loads(content)["record"]).encode())
    with contextlib.suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return b'{"record": %b, "sha256": "%b"}\n' % (body, hashlib.sha256(body).hexdigest().encode())


def byte_level(
    texts: list[str], vocab_size: int, normalizer: tokenizers.normalizers.Normalizer | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE learned on `texts`."""
    bpe, level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    bpe.normalizer, bpe.pre_tokenizer = normalizer, level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def of_tokenizers(folder: Path, data: Path) -> list[Format]:
    of_bytes, of_pieces = folder / "tokenizer.json", folder / "fuzzed.model"
    byte_level(["to be or not to be"] * 9, 270).save(str(of_bytes))
    of_pieces.write_bytes(next(data.glob("*.model")).read_bytes())

    def reader(path: Path) -> Callable[[], None]:
        def read() -> None:
            found = tokenizer.load_tokenizer(path)
            tokens = found.encode_document("to be, é ▁ x\n" * 3).tokens
            assert len(found.token_bytes().base) == found.vocab_size <= 65_536
            assert tokens.max() < found.vocab_size

        return read

    return [
        Format("tokenizer.json", of_bytes, reader(of_bytes), mutations.of_json, per=4),
        Format("tokenizer .model", of_pieces, reader(of_pieces), binary, per=4),
    ]


def of_artifact(folder: Path) -> Format:
    """What an artifact's header says of its model, in an artifact that is whole otherwise."""
    path = folder / "model.sngpt"
    sizes = {"vocab_size": 64, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 1}
    model = ModelConfig(**sizes, mlp_dim=32, max_seq_len=32, family="pre_norm")
    config = Config(model=model, data=DataConfig(seq_len=32), optim=OptimConfig(warmdown_steps=10))
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(model))
    kept = ((path, leaf.shape) for path, leaf in leaves if is_exported(leaf.dtype))
    tensors = {path_name(path): np.zeros(shape, np.float32) for path, shape in kept}
    storage = artifact.Storage(packed=False, codec="zstd", level=1)
    mesh = make_mesh(jax.devices()[:1])
    pieces = {"sha256": "0" * 64, "suffix": ".model"}
    about = {"config": json.loads(to_json(config)), "tokenizer": pieces}
    about |= {"step": 3, "weights": "ema", "version": "0"}
    path.write_bytes(artifact.encode(about, tensors, storage).data)

    def mutate(rng: random.Random, _: bytes) -> bytes:
        changed = json.loads(json.dumps(about))
        for _ in range(rng.choice([1, 1, 2])):
            mutations.edit(rng, changed)
        try:
            return artifact.encode(changed, tensors, storage).data
        except UserError:  # not even written
            return b""

    def read() -> None:
        found = from_artifact(path, mesh)
        assert found.step >= 0 and found.config.model.num_layers <= len(tensors)

    return Format("artifact's metadata", path, read, mutate, per=20)


def of_state_dicts(folder: Path) -> list[Format]:
    state = {"a.weight": np.ones((4, 3), np.float32), "b": np.arange(5, dtype=np.float16)}
    npz, tensors = folder / "model.npz", folder / "model.safetensors"
    np.savez_compressed(npz, **state)
    tensors.write_bytes(safetensors.numpy.save(state))

    def reader(path: Path) -> Callable[[], None]:
        return lambda: [np.asarray(x) for x in read_state_dict(path).values()] and None

    return [Format(path.suffix[1:], path, reader(path), binary) for path in (npz, tensors)]


# ---------------------------------------- running


def fuzz(kind: Format, examples: int, seed: int) -> Tally:
    """Reads so many damaged files of the kind; the whole one is put back."""
    rng, whole, tally = random.Random(f"{kind.name} {seed}"), kind.target.read_bytes(), Tally()
    kind.read()
    for i in range(examples):
        content = kind.mutate(rng, whole)
        kind.target.write_bytes(content)
        tracemalloc.start()
        start, worked = time.perf_counter(), time.process_time()
        try:
            kind.read()
        except UserError as error:
            line = str(error)
            tally.refused += 1
            named = str(kind.target.parent) in line or "datasets/manifest.json" in line
            if not named or "\n" in line or len(line) > 1500:
                tally.others.append(f"example {i}: the line {line[:300]!r}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            tally.others.append(f"example {i}: {type(error).__name__}: {str(error)[:300]}")
        else:
            tally.accepted += 1
        # the lesser one: a busy machine makes no reader slow
        seconds = min(time.perf_counter() - start, time.process_time() - worked)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tally.examples += 1
        tally.seconds += seconds
        tally.slowest, tally.memory = max(tally.slowest, seconds), max(tally.memory, memory)
        if seconds > SLOWEST or memory > MOST_MEMORY:
            tally.others.append(f"example {i}: {seconds:.1f} s, {memory >> 20} MiB")
    kind.target.write_bytes(whole)
    return tally


HEADS = {"format": 24, "examples": 9, "accepted": 9, "refused": 9, "seconds": 8}
HEADS |= {"slowest, ms": 12, "memory, MiB": 12, "other": 6}  # width of the column


def show(bar: str, row: Iterable[object]) -> None:
    """Prints a row of the table."""
    cells = (f" {x!s:<{width}}" for x, width in zip(row, HEADS.values(), strict=True))
    print(bar + bar.join(cells) + bar, flush=True)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--examples", type=int, default=1000, help="per format, fewer if slow")
    parser.add_argument("--formats", default="", help="names, separated by commas; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="a table for docs/security.md")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    wanted, failed = arguments.formats.split(",") if arguments.formats else None, 0
    bar = "|" if arguments.markdown else " "
    show(bar, HEADS)
    if arguments.markdown:
        print("|---" * len(HEADS) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in make_formats(Path(folder)):
            if wanted and kind.name not in wanted:
                continue
            t = fuzz(kind, max(1, arguments.examples // kind.per), arguments.seed)
            times = f"{t.seconds:.1f}", f"{1e3 * t.slowest:.0f}", f"{t.memory / 2**20:.1f}"
            show(bar, (kind.name, t.examples, t.accepted, t.refused, *times, len(t.others)))
            for other in t.others[:5]:
                print(f"  {other}", file=sys.stderr)
            failed += len(t.others)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
