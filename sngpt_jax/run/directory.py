"""What a run directory holds, who may write to it, and how a trained model is read back from it.

config.json     the resolved configuration; replays the run tokenizer.*     the tokenizer that the
model was trained with data.json       which tokens it takes metrics.jsonl   one object a line
environment.jsonl  versions, devices and commit: a line at every start of the run checkpoints/
orbax checkpoints with their checksums tensorboard/    the metrics again profile/
jax.profiler traces, where asked for summary.json    written when the run has finished .lock,
.shared  held while it trains; by which several processes know that they see the same directory
"""

import contextlib
import fcntl
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
from sngpt_jax.base.files import write_bytes_atomic, write_text_atomic
from sngpt_jax.cluster import processes
from sngpt_jax.config import Config, differences, to_json
from sngpt_jax.config import file as config_file
from sngpt_jax.data.shards import Dataset
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("sngpt_jax")

_SEEN_WITHIN = 15.0  # seconds until a network file system shows a file to other nodes


def config_path(run_dir: Path) -> Path:
    """The configuration that replays the run."""
    return run_dir / "config.json"


def checkpoint_dir(run_dir: Path) -> Path:
    """The folder of the run's checkpoints, one a step."""
    return run_dir / "checkpoints"


def summary_path(run_dir: Path) -> Path:
    """What a finished run came to; missing until then."""
    return run_dir / "summary.json"


def tokenizer_path(run_dir: Path) -> Path | None:
    """The run's own copy of its tokenizer; None where weights were imported without one."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if (run_dir / name).is_file():
            return run_dir / name
    return None


def read_config(run_dir: Path) -> Config:
    """The configuration of the run in `run_dir`; a `UserError` where there is no run."""
    if not config_path(run_dir).exists():
        raise UserError(
            f"{run_dir}: not a run directory (no config.json); give the --run-dir of a training run"
        )
    return config_file.read(config_path(run_dir))


@contextlib.contextmanager
def claim(run_dir: Path, config: Config) -> Iterator[None]:
    """Holds `run_dir` for one training, of one process or several that see the same directory.

    Refuses a directory that another training holds, or whose run has another configuration;
    `train.fsdp`, `train.shard_optimizer` and `train.compilation_cache` may differ.
    """
    with _lock(run_dir) if processes.index() == 0 else contextlib.nullcontext():
        _check_shared(run_dir)
        if config_path(run_dir).exists():
            changed = differences(
                config_file.with_own_cache(read_config(run_dir)), config_file.with_own_cache(config)
            )
            # fits any
            layout = [
                line
                for line in changed
                if line.startswith(("train.fsdp:", "train.shard_optimizer:"))
            ]
            changed = [line for line in changed if line not in layout]
            if layout and not changed:
                logger.info(
                    f"{run_dir} goes on with another layout of its state: {'; '.join(layout)}"
                )
            if changed:
                raise UserError(
                    f"{run_dir} holds a run of another configuration; choose another --run-dir, or"
                    f" undo: {'; '.join(changed)}"
                )
        yield


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a")  # what a link leads to keeps its bytes
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be used as a run directory: {error.strerror}; choose another"
            " --run-dir"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is training in it; wait for it or choose another"
                " --run-dir"
            ) from None
        except OSError as error:  # a file system without locks
            raise UserError(
                f"{run_dir}: cannot be locked: {error.strerror}; choose another --run-dir"
            ) from None
        for leftover in run_dir.glob("*.tmp-*"):  # of a killed run: the lock is ours
            # the name that `write_bytes_atomic` gives
            if leftover.suffix[5:].isdigit() and leftover.is_file():
                leftover.unlink()
        yield


def _check_shared(run_dir: Path) -> None:
    """Raises `UserError` in a process that does not find in `run_dir` what process 0 writes there."""
    if processes.count() == 1:
        return
    mark = run_dir / ".shared"

    def leave_mark() -> list[str]:
        text = secrets.token_hex(8)
        with _writing(run_dir):
            write_text_atomic(mark, text)
        return [str(run_dir.absolute()), text]

    def seen() -> bool:
        try:
            return mark.read_text() == text
        except OSError:  # not there yet, or replaced meanwhile
            return False

    path, text = processes.broadcast(leave_mark)
    if path != str(run_dir.absolute()):
        raise UserError(
            f"--run-dir is {run_dir.absolute()} here and {path} in process 0; give all processes"
            " the same path"
        )
    deadline = time.monotonic() + _SEEN_WITHIN
    while not seen():
        if time.monotonic() > deadline:
            raise UserError(
                f"{run_dir}: not the directory that process 0 writes to; choose a --run-dir that"
                " all nodes share"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written: {error.strerror}; mend that or choose another --run-dir"
        ) from None


def begin(run_dir: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Makes a claimed directory the run of `config`: keeps its config.json and tokenizer, or finds
    the same ones there.

    `tokenizer` is None where it is not known, for weights from elsewhere, which can be scored and
    not sampled from. To be called once nothing can be wrong with the recipe any more, so that a
    mistake leaves no run behind.
    """
    kept = run_dir / f"tokenizer{tokenizer.path.suffix}" if tokenizer else None
    if tokenizer and kept and kept.exists() and load_tokenizer(kept).sha256 != tokenizer.sha256:
        raise UserError(
            f"{kept}: the run was started with another tokenizer than {tokenizer.path}; choose"
            " another --run-dir"
        )
    with _writing(run_dir):
        if tokenizer and kept and not kept.exists():
            write_bytes_atomic(kept, tokenizer.path.read_bytes())
        if not config_path(run_dir).exists():
            write_text_atomic(config_path(run_dir), to_json(config))


@dataclass(frozen=True)
class _Tokens:
    """data.json."""

    train_tokens: int
    val_tokens: int
    sha256: str  # of the shards' names, lengths and checksums


def keep_data(run_dir: Path, data: Dataset) -> None:
    """Notes in a claimed directory which tokens the run takes, or finds the same noted there.

    Raises `UserError` where it began with others: prepared from another text since, say. What
    stands in the shards is compared by the manifest's checksums, whether or not the shards
    themselves are read back.
    """
    shards = (*data.manifest.train, *data.manifest.val) if data.manifest else ()
    names = [
        (shard.path.name, len(shard.tokens)) for shard in (*data.train.shards, *data.val.shards)
    ]
    listed = json.dumps([names, [shard.sha256 for shard in shards]]).encode()
    found = _Tokens(len(data.train), len(data.val), hashlib.sha256(listed).hexdigest())
    path = run_dir / "data.json"
    if not path.exists():
        with _writing(run_dir):
            write_text_atomic(path, json.dumps(asdict(found), indent=2) + "\n")
    elif (
        noted := typed_json.parse(_Tokens, typed_json.read(path, UserError), str(path), UserError)
    ) != found:
        counts = [
            f"{x.train_tokens:,} training and {x.val_tokens:,} validation tokens"
            for x in (noted, found)
        ]
        raise UserError(
            f"{data.directory}: not the data that the run in {run_dir} began with ({counts[0]}"
            f" then, {counts[1]} now); put them back, or choose another --run-dir"
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
    untrained_val_bpb: float | None  # None where the untrained model was not validated
    train_seconds: float
    tok_per_s: float
    parameters: int
    checkpoint: str
    swa_val_bpb: float | None  # of the averages of the weights, None where the recipe keeps none
    ema_val_bpb: float | None


def read_summary(run_dir: Path) -> Summary | None:
    """The summary of a finished run, None where the run has not finished."""
    if not summary_path(run_dir).exists():
        return None
    path = summary_path(run_dir)
    return typed_json.parse(
        Summary, typed_json.read(path, UserError), str(path), UserError, defaulted=[]
    )


def write_summary(run_dir: Path, summary: Summary) -> None:
    """Writes `summary` as JSON, atomically."""
    with _writing(run_dir):
        write_text_atomic(summary_path(run_dir), json.dumps(asdict(summary), indent=2) + "\n")
