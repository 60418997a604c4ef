"""What to prepare, and whether a folder holds it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sngpt_jax.base.errors import UserError
from sngpt_jax.config import PathText
from sngpt_jax.data.corpus import Reading, check_reading, fingerprint
from sngpt_jax.data.manifest import Manifest, Origin
from sngpt_jax.data.split import DEFAULT_FRACTION, HUB_DOCUMENTS, Split, choose
from sngpt_jax.data.tokenizer import load_tokenizer

COMMAND = "sngpt_jax.prepare"  # the module that prepares

DEFAULT_VOCAB_SIZE = 1024  # of a tokenizer to learn, or of golf


@dataclass(frozen=True)
class PrepareSpec:
    """What to prepare, and where to."""

    # stdlib; a file (.txt, .md, .py, .jsonl, .json, .csv, each also .gz or .zst, or .parquet); a
    # folder of such files; hub:NAME[:CONFIG][@SPLIT]; golf[:spV]
    source: PathText
    out: PathText  # folder for the shards, the tokenizer and manifest.json
    # a SentencePiece .model, a tokenizer.json, or train: learn one on the training documents
    tokenizer: PathText = "train"
    val_source: PathText = ""  # separate validation text, instead of documents of the source
    val_docs: int = 0  # documents to hold out from the start of the source, instead of a fraction
    # share of the documents to hold out, drawn by split_seed, or of a single document's end; 0: 0.1
    val_fraction: float = 0.0
    split_seed: int = 0  # seed that draws the held-out documents
    allow_overlap: bool = False  # keep training documents that are in the validation text, too
    # vocabulary size of a tokenizer to learn or of golf (0: 1024); limit for a given one (0: none)
    vocab_size: int = 0
    # how the learned tokenizer changes text: identity keeps every character; nmt_nfkc, the
    # challenge's, folds whitespace and compatibility characters
    normalization: Literal["identity", "nmt_nfkc"] = "identity"
    shard_tokens: int = 100_000_000  # tokens per shard
    max_tokens: int = 0  # stop after this many training tokens; 0: no limit
    # key or column with the text, in .jsonl, .json, .csv and .parquet files and in hub data sets
    text_key: str = "text"
    # text files (.txt, .md, .py) are cut into documents at this text; empty: at lines that hold
    # only <|endoftext|>
    split_on: str = ""

    @property
    def reading(self) -> Reading:
        """How documents are taken from files. Raises `UserError`."""
        return Reading(self.text_key, self.split_on)


def option(field: str) -> str:
    """The command line option of a field."""
    return f"--{field.replace('_', '-')}"


def command_line(spec: PrepareSpec) -> list[str]:
    """The arguments of `COMMAND` that prepare `spec`."""
    words = []
    for field in dataclasses.fields(spec):
        name, value = option(field.name), getattr(spec, field.name)
        if value is True:
            words.append(name)
        elif value != field.default:  # after a space the parser takes a leading - for an option
            dashed = str(value).startswith("-")
            words += [f"{name}={value}"] if dashed else [name, str(value)]
    return words


# An origin's fields in groups: if the file of one is missing, `differing` compares the others.
def _source_fields(spec: PrepareSpec) -> dict[str, Any]:
    return {"source": fingerprint(spec.source)}


def _val_fields(spec: PrepareSpec) -> dict[str, Any]:
    rule = {"val_source": "", "val_docs": spec.val_docs, "val_fraction": 0.0, "split_seed": 0}
    if spec.val_source:
        rule |= {"val_source": fingerprint(spec.val_source), "val_docs": 0}
    elif not spec.val_docs and spec.source.startswith("hub:") and not spec.val_fraction:
        rule["val_docs"] = HUB_DOCUMENTS
    elif not spec.val_docs:
        rule["val_fraction"] = spec.val_fraction or DEFAULT_FRACTION
        rule["split_seed"] = spec.split_seed
    return rule


def _tokenizer_fields(spec: PrepareSpec) -> dict[str, Any]:
    if spec.tokenizer == "train":
        name, size, rule = "train", spec.vocab_size or DEFAULT_VOCAB_SIZE, str(spec.normalization)
    else:
        given = load_tokenizer(Path(spec.tokenizer))
        name, size, rule = f"sha256:{given.sha256}", given.vocab_size, ""
    return {"tokenizer": name, "vocab_size": size, "normalization": rule}


def _reading_fields(spec: PrepareSpec) -> dict[str, Any]:
    return dataclasses.asdict(spec.reading)


def check_size(spec: PrepareSpec, what: str, vocab_size: int) -> None:
    """Raises `UserError` if `what` has more tokens than `spec` allows."""
    if 0 < spec.vocab_size < vocab_size:
        most = f"expected at most --vocab-size {spec.vocab_size} tokens"
        raise UserError(f"{what}: {most}, found {vocab_size}")


def origin_of(spec: PrepareSpec) -> Origin:
    """The settings and hashes that decide the bytes of the files. Raises `UserError`."""
    check_reading(spec.reading, [text for text in (spec.source, spec.val_source) if text])
    fields = _source_fields(spec) | _val_fields(spec) | _tokenizer_fields(spec)
    fields |= _reading_fields(spec)
    check_size(spec, f"--tokenizer {spec.tokenizer}", fields["vocab_size"])
    if fields["source"] == fields["val_source"]:
        same = f"--val-source {spec.val_source} is the same text as --source {spec.source}"
        raise UserError(f"{same}; give another, or none to hold out a part of the source")
    return Origin(
        **fields,
        shard_tokens=spec.shard_tokens,
        max_tokens=spec.max_tokens,
        allow_overlap=spec.allow_overlap,
    )


def split_of(spec: PrepareSpec, origin: Origin) -> Split:
    """Which documents of the source are for training. Raises `UserError` if none are."""
    rule = origin.val_docs, origin.val_fraction, origin.split_seed
    return choose(spec.source, spec.val_source, *rule, spec.reading)


def differing(spec: PrepareSpec, manifest: Manifest) -> tuple[dict[str, str], list[str]]:
    """How a finished folder differs from what `spec` would make: phrases about its settings by
    field, and about texts and tokenizers on this machine: missing, edited, or of another Python's
    library.
    """
    asked: dict[str, Any] = {}
    machine = []
    for fields in (_source_fields, _val_fields, _tokenizer_fields, _reading_fields):
        try:
            asked |= fields(spec)
        except UserError as error:
            machine.append(str(error))
    lines = manifest.origin.differences(asked)
    for name in ("source", "val_source"):
        found = (getattr(manifest.origin, name), asked.get(name, ""))
        kinds = {text.partition(" ")[0] for text in found}
        if name in lines and len(kinds) == 1 and (name == "source" or kinds == {"stdlib"}):
            machine.append(lines.pop(name))
    return lines, machine
