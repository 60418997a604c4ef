"""Text, a tokenizer and helpers that several tests of the data share."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.shards import Shard, TokenStream
from sngpt_jax.data.tokenizer import NO_CORRECTIONS

WORDS = ["river", "stone", "naïve", "über", "日本", "x = 3\n", "    return", "snow", "2024", "of"]
WORDS += ["the", "▁", "🙂", "é" * 30]


class BytesOfPair:
    """A stand-in for a table of bytes that depends on both tokens: a shifted window shows."""

    def count(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return previous.astype(np.int64) * 1000 + tokens


def stream_of(*pieces: Any, vocab_size: int = 2**16, extras: Any = None) -> TokenStream:
    """A stream of shards `0.bin`, `1.bin`, … with these tokens."""
    extras = extras or [NO_CORRECTIONS] * len(pieces)
    made = (
        Shard(Path(f"{i}.bin"), np.asarray(tokens, np.uint16), extra)
        for i, (tokens, extra) in enumerate(zip(pieces, extras, strict=True))
    )
    return TokenStream(tuple(made), vocab_size)


def write_jsonl(path: Path, count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Writes `count` documents of random words to `path`; returns them."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, longest))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def refuses(pattern: str, call: Any, *arguments: Any, kind: type[UserError] = UserError) -> None:
    """Asserts that the call raises a `kind` whose message is one line that matches `pattern`."""
    with pytest.raises(kind, match=pattern) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


damaged = partial(refuses, kind=DataError)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for `condition`, at most so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    """The files that a preparation leaves, by name."""
    kept = (path for path in folder.iterdir() if path.name not in (".lock", ".slurm"))
    return {path.name: path.read_bytes() for path in kept}


def start(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    """Starts `prepare` in a process group of its own."""
    command = [sys.executable, "-m", "sngpt_jax.prepare", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes, **more)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 90 tokens without byte fallback: some characters are unknown."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    texts = ["the river and the stone, naïve snow of 2024 x = 3\n    return é", "日本 über alles"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 40),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=90,
        add_dummy_prefix=False,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
    )
    return path
