"""A `tokenizer.json`, read strictly before the `tokenizers` library sees it.

The library takes parts that add, drop or rewrite text, and can end the process on a damaged file.
Only the parts that encoding needs are handed over, and only after the checks here.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import shown
from sngpt_jax.data.tokenizer.base import check_vocab

_Behavior = Literal["Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


@dataclass(frozen=True)
class _Plain:
    type: str


@dataclass(frozen=True)
class _ByteLevel:
    type: str
    add_prefix_space: bool
    trim_offsets: bool = True
    use_regex: bool = True


@dataclass(frozen=True)
class _Split:
    type: str
    pattern: dict[str, str]
    behavior: _Behavior
    invert: bool = False


@dataclass(frozen=True)
class _Digits:
    type: str
    individual_digits: bool = False


@dataclass(frozen=True)
class _Punctuation:
    type: str
    behavior: _Behavior = "Isolated"


@dataclass(frozen=True)
class _Bpe:
    vocab: dict[str, int]
    merges: Any  # "a b" or ["a", "b"] each
    type: str = "BPE"  # old files do not name it
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


@dataclass(frozen=True)
class _AddedToken:
    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


# These change the form of characters, and make no text empty. The others add text (Replace,
# Prepend, ByteLevel), drop it (Strip, StripAccents, Nmt), or follow tables of their own.
_NORMALIZERS = dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase"), _Plain)
# These only cut the text. ByteLevel comes last and writes bytes in GPT-2's alphabet.
_PRE_TOKENIZERS = {
    "Split": _Split,
    "Digits": _Digits,
    "Punctuation": _Punctuation,
    "ByteLevel": _ByteLevel,
}
_DECODERS = {"ByteLevel": _ByteLevel}

_PROGRAM = """
import sys, tokenizers
tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode()).encode("The 12 dogs'll  go.\\n")
"""


def checked(path: Path, data: bytes) -> str:
    """The JSON to hand to the library for the file `path` of content `data`: its model, normalizer,
    pre-tokenizer and added tokens. Post-processor, truncation and padding are left out, because a
    document gets nothing but its BOS. The decoder is checked and left out.

    Raises `UserError` that names the part if the file is damaged or has another kind of part. The
    library compiles regular expressions, which no check here covers: a child process tries them.
    """
    try:
        spec = typed_json.loads(data)
    except ValueError:
        spec = None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer.json, or a damaged one")
    added = _added_tokens(path, spec.get("added_tokens") or [])
    model = _model(path, spec["model"], added)
    steps = {
        "normalizer": _steps(path, spec, "normalizer", "normalizers", _NORMALIZERS),
        "pre_tokenizer": _steps(path, spec, "pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS),
    }
    _steps(path, spec, "decoder", "decoders", _DECODERS)
    _check_pre_tokenizers(path, steps["pre_tokenizer"])
    handed = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [asdict(token) for token in added],
            "normalizer": {"type": "Sequence", "normalizers": steps["normalizer"]}
            if steps["normalizer"]
            else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps["pre_tokenizer"]},
            "post_processor": None,
            "decoder": None,
            "model": model,
        }
    )
    if any("Regex" in step.get("pattern", ()) for step in steps["pre_tokenizer"]):
        try_in_child(path, handed)
    return handed


def _steps(
    path: Path, spec: dict[str, Any], part: str, inner: str, kinds: Mapping[str, type]
) -> list[dict[str, Any]]:
    """The steps of a part of the file, in order, with every option set."""
    found: list[dict[str, Any]] = []

    def add(step: Any) -> None:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Sequence" and isinstance(step.get(inner), list):
            for each in step[inner]:
                add(each)
        elif isinstance(kind, str) and kind in kinds:
            where = f"{path}: {part} {kind}"
            found.append(asdict(typed_json.parse(kinds[kind], step, where, UserError, None, [])))
        else:
            name = shown(kind) if isinstance(kind, str) else "without a type"
            known = ", ".join(kinds)
            raise UserError(f"{path}: its {part} {name} may change the text; known are {known}")

    if spec.get(part) is not None:
        add(spec[part])
    return found


def _check_pre_tokenizers(path: Path, steps: list[dict[str, Any]]) -> None:
    kinds = [step["type"] for step in steps]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        problem = "its last pre-tokenizer is not ByteLevel without add_prefix_space"
        raise UserError(f"{path}: not a byte-level BPE that spells every text: {problem}")
    for step in steps:
        pattern = step.get("pattern")
        if pattern is not None and (
            len(pattern) != 1 or not pattern.keys() <= {"String", "Regex"} or "" in pattern.values()
        ):
            raise UserError(f"{path}: the pattern of its pre-tokenizer Split is no String or Regex")


def _added_tokens(path: Path, found: Any) -> list[_AddedToken]:
    if not isinstance(found, list):
        raise UserError(f"{path}: added_tokens: expected a list")
    tokens = [
        typed_json.parse(_AddedToken, token, f"{path}: added_tokens[{i}]", UserError, None, [])
        for i, token in enumerate(found)
    ]
    for name in ("id", "content"):
        if len({getattr(token, name) for token in tokens}) < len(tokens):
            raise UserError(f"{path}: two of its added tokens have the same {name}")
    if any(not token.content for token in tokens):
        raise UserError(f"{path}: one of its added tokens is empty")
    return tokens


def _model(path: Path, found: dict[str, Any], added: list[_AddedToken]) -> dict[str, Any]:
    kind = found.get("type", "BPE")
    if kind != "BPE":
        raise UserError(f"{path}: its model is {shown(str(kind))}; expected BPE")
    model = typed_json.parse(_Bpe, found, f"{path}: model", UserError, None, [])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if getattr(model, name):
            raise UserError(f"{path}: its model sets {name}; a byte-level BPE has none")
    vocab = model.vocab
    ids = [*vocab.values(), *(token.id for token in added)]
    check_vocab(path, max(ids, default=-1) + 1)  # the library makes a list of this length
    pieces = {i: piece for piece, i in vocab.items()}
    if len(pieces) < len(vocab) or min(ids, default=0) < 0:
        raise UserError(f"{path}: model.vocab: ids must be different, and none negative")
    for token in added:
        if vocab.get(token.content, token.id) != token.id or (
            pieces.get(token.id, token.content) != token.content
        ):
            raise UserError(
                f"{path}: its added token {shown(token.content)} has another id in model.vocab"
            )
    merges = model.merges if isinstance(model.merges, list) else [None]
    for i, merge in enumerate(merges):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str(left), str(right)] if {left, right, left + right} <= vocab.keys():
                continue
        raise UserError(f"{path}: model.merges[{i}]: expected two pieces whose union is a piece")
    return asdict(model)


def try_in_child(path: Path, handed: str, program: str = _PROGRAM, seconds: float = 60) -> None:
    """Runs the Python `program` with `handed` as its input in a process of its own.

    Raises `UserError` about the file `path` if the process fails, is ended by a signal, or takes
    longer than `seconds`. A regular expression of a file can do this to the library that reads it.
    """
    command = [sys.executable, "-P", "-c", program]
    try:
        run = subprocess.run(command, input=handed.encode(), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        problem = f"takes longer than {seconds:g} s"
    else:
        if not run.returncode:
            return
        said = run.stderr.decode(errors="replace").split("\n")
        reason = next((line.strip()[:300] for line in reversed(said) if line.strip()), "no reason")
        by_signal = f"was ended by signal {-run.returncode}"
        problem = by_signal if run.returncode < 0 else f"failed: {reason}"
    raise UserError(f"{path}: not usable: a trial of the tokenizers library on it {problem}")
