"""What a run directory holds, and who may write to it.

config.json        the resolved configuration; replays the run
tokenizer.*        the tokenizer that the model was trained with
imported.json      the file that the run's first weights came from, of an import
data.json          which tokens the run takes
metrics.jsonl      one object per line
environment.jsonl  versions, devices and commit; one line per start of the run
checkpoints/       orbax checkpoints with their records
tensorboard/       the metrics again
profile/           jax.profiler traces, on request
summary.json       written when the run has finished
.lock              held while the run trains
.shared            shows several processes that they use the same directory
"""

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import locked, remove_leftovers, write_bytes_atomic, write_text_atomic
from sngpt_jax.cluster import processes
from sngpt_jax.config import ByteCount, Config, changed, differences, to_json
from sngpt_jax.config import file as config_file
from sngpt_jax.data.shards import Dataset
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.run.records import check_path

logger = logging.getLogger("sngpt_jax")

_SEEN_WITHIN = 15.0  # seconds until a network file system shows a file to other nodes
# differences that fit any checkpoint
_LAYOUT = (
    "train.fsdp:",
    "train.shard_optimizer:",
    "train.device_batch_tokens:",
    "eval.device_batch_tokens:",
)


def _config_path(run_dir: Path) -> Path:
    return run_dir / "config.json"


def checkpoint_dir(run_dir: Path) -> Path:
    """The folder of the run's checkpoints."""
    return run_dir / "checkpoints"


def summary_path(run_dir: Path) -> Path:
    """The file of the finished run's result; missing until then."""
    return run_dir / "summary.json"


def imported_path(run_dir: Path) -> Path:
    """The file that marks a run of imported weights, from before its first checkpoint on."""
    return run_dir / "imported.json"


def tokenizer_path(run_dir: Path) -> Path | None:
    """The run's own copy of its tokenizer; None for weights that were imported without one."""
    paths = (run_dir / "tokenizer.model", run_dir / "tokenizer.json")
    return next((path for path in paths if path.is_file()), None)


def read_config(run_dir: Path) -> Config:
    """The configuration of the run in `run_dir`. Raises `UserError` if there is no run."""
    path = _config_path(run_dir)
    if not path.exists():
        raise UserError(
            f"{run_dir}: not a run directory (no {path.name}); give the --run-dir of a training run"
        )
    return config_file.read(path)


@contextlib.contextmanager
def claim(run_dir: Path, config: Config) -> Iterator[Config]:
    """Holds `run_dir` for one training, of one process or of several that share the directory.
    Gives `config`, where an automatic `train.device_batch_tokens` becomes the run's own.

    Raises `UserError` if another training holds it, or if its run has another configuration.
    `train.fsdp`, `train.shard_optimizer`, `device_batch_tokens` of `train` and `eval`, and
    `train.compilation_cache` may differ. A finished run is only read, so it may lie where nobody
    can write.
    """
    check_path(run_dir)
    held = f"{run_dir}: another process is training in it; wait for it or choose another --run-dir"
    writes = processes.index() == 0 and not summary_path(run_dir).exists()
    with locked(run_dir, held) if writes else contextlib.nullcontext():
        if writes:
            remove_leftovers(run_dir)
        _check_shared(run_dir)
        if _config_path(run_dir).exists():
            config = _check_config(run_dir, config)
        yield config


def _check_config(run_dir: Path, config: Config) -> Config:
    began = read_config(run_dir)
    if not config.train.device_batch_tokens:
        tokens = began.train.device_batch_tokens
        config = changed(config, train={"device_batch_tokens": tokens})
    found = differences(*map(config_file.with_own_cache, (began, config)))
    if undo := "; ".join(line for line in found if not line.startswith(_LAYOUT)):
        raise UserError(
            f"{run_dir} holds a run of another configuration; choose another --run-dir, or undo:"
            f" {undo}"
        )
    if found:
        logger.info(f"{run_dir} resumes with another layout: {'; '.join(found)}")
    return config


def _check_shared(run_dir: Path) -> None:
    """Raises `UserError` if this process does not find in `run_dir` what process 0 writes there."""
    if processes.count() == 1:
        return
    here, mark = str(run_dir.absolute()), run_dir / ".shared"

    def leave_mark() -> list[str]:
        text = secrets.token_hex(8)
        write_text_atomic(mark, text)
        return [here, text]

    def seen() -> bool:
        try:
            return mark.read_text() == text
        except OSError:  # not there yet, or being replaced
            return False

    there, text = processes.broadcast(leave_mark)
    if there != here:
        raise UserError(f"--run-dir is {here} here and {there} in process 0; give the same path")
    deadline = time.monotonic() + _SEEN_WITHIN
    while not seen():
        if time.monotonic() > deadline:
            raise UserError(
                f"{run_dir}: process 0 writes to another one; choose one that all nodes share"
            )
        time.sleep(0.2)


def begin(run_dir: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Writes config.json and the tokenizer into a claimed directory, or finds the same ones there.

    `tokenizer` is None for weights that were imported without one. Call this after all checks of
    the recipe, so that a mistake leaves no run behind.
    """
    if tokenizer:
        kept = run_dir / f"tokenizer{tokenizer.path.suffix}"
        if not kept.exists():
            write_bytes_atomic(kept, tokenizer.path.read_bytes())
        elif load_tokenizer(kept).sha256 != tokenizer.sha256:
            raise UserError(
                f"{kept}: the run began with another tokenizer than {tokenizer.path}; choose"
                " another --run-dir"
            )
    # an import leaves automatic microbatches to the training
    if not _config_path(run_dir).exists() or not read_config(run_dir).train.device_batch_tokens:
        write_text_atomic(_config_path(run_dir), to_json(config))


@dataclass(frozen=True)
class _Tokens:
    """data.json."""

    train_tokens: int
    val_tokens: int
    sha256: str  # of the shards' names, lengths and checksums


def keep_data(run_dir: Path, data: Dataset) -> None:
    """Writes to a claimed directory which tokens the run takes, or finds the same ones there.

    Compares the manifest's checksums; the shards are not read. Raises `UserError` if the run began
    with others.
    """
    shards = (*data.train.shards, *data.val.shards)
    names = [(shard.path.name, len(shard.tokens)) for shard in shards]
    noted = (*data.manifest.train, *data.manifest.val) if data.manifest else ()
    listed = json.dumps([names, [entry.sha256 for entry in noted]]).encode()
    found = _Tokens(len(data.train), len(data.val), hashlib.sha256(listed).hexdigest())
    path = run_dir / "data.json"
    if not path.exists():
        write_text_atomic(path, json.dumps(asdict(found), indent=2) + "\n")
        return
    began = typed_json.parse(_Tokens, typed_json.read(path, UserError), str(path), UserError)
    if began != found:
        then, now = (
            f"{x.train_tokens:,} training and {x.val_tokens:,} validation tokens"
            for x in (began, found)
        )
        raise UserError(
            f"{data.directory}: not the data that the run in {run_dir} began with ({then} then,"
            f" {now} now); put them back, or choose another --run-dir"
        )


@dataclass(frozen=True)
class Summary:
    """The result of a finished run."""

    steps: int
    tokens: int
    val_loss: float
    val_bpb: float
    val_tokens: int
    best_val_loss: float
    untrained_val_bpb: float | None  # if the untrained model was validated
    train_seconds: float
    tok_per_s: float
    parameters: int
    checkpoint: str
    swa_val_bpb: float | None  # of the averaged weights, if the recipe keeps them
    ema_val_bpb: float | None
    val_data: str | None = None  # name of the scored data; None in runs of an earlier version
    val_hash: str | None = None  # their hash (`sngpt_jax.data.identity`)
    val_byte_count: ByteCount = "golf"  # runs without the field were scored with this count


def read_summary(run_dir: Path) -> Summary | None:
    """The summary of a finished run; None if the run has not finished."""
    path = summary_path(run_dir)
    if not path.exists():
        return None
    values = typed_json.read(path, UserError)
    return typed_json.parse(Summary, values, str(path), UserError, defaulted=[])


def write_summary(run_dir: Path, summary: Summary) -> None:
    """Writes `summary` as JSON, atomically."""
    write_text_atomic(summary_path(run_dir), json.dumps(asdict(summary), indent=2) + "\n")
