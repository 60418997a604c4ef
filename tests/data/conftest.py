"""Text and a tokenizer that several tests of the data share."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.manifest import DataError

WORDS = ["river", "stone", "naïve", "über", "日本", "x = 3\n", "    return", "snow", "2024", "of"]
WORDS += ["the", "▁", "🙂", "é" * 30]


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


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 90 tokens without byte fallback. Some characters are unknown tokens,
    whose bytes only preparation can count.
    """
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
