"""What to prepare, as asked for on a command line or by a recipe, and whether a folder holds just
that.
"""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.corpus import fingerprint
from sngpt_jax.data.manifest import Manifest, Origin
from sngpt_jax.data.tokenizer import load_tokenizer

COMMAND = "sngpt_jax.prepare"  # the module that prepares

_LEARNT_VOCAB_SIZE = 1024


@dataclass(frozen=True)
class PrepareSpec:
    """What to prepare, and where to."""

    # stdlib, a .txt, .jsonl[.gz|.zst] or .parquet file, a folder, hub:NAME[:CONFIG][@SPLIT],
    # golf[:spV]
    source: str
    out: str  # folder that gets the shards, the tokenizer and manifest.json
    # a SentencePiece .model, a tokenizer.json, or train: learn one on the training documents
    tokenizer: str = "train"
    val_source: str = ""  # validation text of its own; empty: the source's first val_docs documents
    val_docs: int = 50_000  # documents held out for validation when there is no val_source
    # tokens of the tokenizer to learn or of golf (0: 1024), or the most of a given one (0: any)
    vocab_size: int = 0
    # of a learnt tokenizer; identity keeps all whitespace
    normalization: Literal["nmt_nfkc", "identity"] = "nmt_nfkc"
    shard_tokens: int = 100_000_000  # tokens in a shard
    max_tokens: int = 0  # training tokens after which to stop; 0: no limit


def command_line(spec: PrepareSpec) -> list[str]:
    """The arguments of the command (`COMMAND`) that prepares `spec`; options at their defaults are
    left out.
    """
    given = [f for f in dataclasses.fields(spec) if getattr(spec, f.name) != f.default]
    return [
        word
        for f in given
        for word in (f"--{f.name.replace('_', '-')}", str(getattr(spec, f.name)))
    ]


def _source_fields(spec: PrepareSpec) -> dict[str, Any]:
    return {"source": fingerprint(spec.source)}


def _val_fields(spec: PrepareSpec) -> dict[str, Any]:
    if spec.val_source:
        return {"val_source": fingerprint(spec.val_source), "val_docs": 0}
    return {"val_source": "", "val_docs": spec.val_docs}


def _tokenizer_fields(spec: PrepareSpec) -> dict[str, Any]:
    if spec.tokenizer == "train":
        vocab_size = spec.vocab_size or _LEARNT_VOCAB_SIZE
        return {
            "tokenizer": "train",
            "vocab_size": vocab_size,
            "normalization": str(spec.normalization),
        }
    given = load_tokenizer(Path(spec.tokenizer))
    return {
        "tokenizer": f"sha256:{given.sha256}",
        "vocab_size": given.vocab_size,
        "normalization": "",
    }


def check_size(spec: PrepareSpec, what: str, vocab_size: int) -> None:
    """Raises `UserError` where `what` has more tokens than `spec` allows; a model's rows beyond
    them do no harm.
    """
    if 0 < spec.vocab_size < vocab_size:
        raise UserError(
            f"{what}: expected at most --vocab-size {spec.vocab_size} tokens, found {vocab_size}"
        )


def origin_of(spec: PrepareSpec) -> Origin:
    """What decides the files' bytes: hashes in place of names, and nothing of the options that do
    not matter here.
    """
    fields = _source_fields(spec) | _val_fields(spec) | _tokenizer_fields(spec)
    check_size(spec, f"--tokenizer {spec.tokenizer}", fields["vocab_size"])
    if fields["source"] == fields["val_source"]:
        raise UserError(
            f"--val-source {spec.val_source} is the same text as --source {spec.source}: the model"
            " would be scored on what it was trained on; give another --val-source, or none to"
            " hold out --val-docs"
        )
    return Origin(**fields, shard_tokens=spec.shard_tokens, max_tokens=spec.max_tokens)


def differing_fields(there: Origin, asked: dict[str, Any]) -> dict[str, str]:
    """A phrase for each field in which `asked` differs from `there`."""
    old = asdict(there)
    return {
        name: f"{name}: {old[name]!r} there, {new!r} asked for"
        for name, new in asked.items()
        if old[name] != new
    }


def differing(spec: PrepareSpec, manifest: Manifest) -> tuple[list[str], list[str]]:
    """How a finished folder differs from what `spec` would make, a phrase each: (in its settings,
    in what is on this machine).

    The second are texts and tokenizer files that are not here, a source of the same kind with
    other content, and the library of another Python. The size of the shards and of the whole may
    differ.
    """
    asked: dict[str, Any] = {}
    machine = []
    for fields in (_source_fields, _val_fields, _tokenizer_fields):
        try:
            asked |= fields(spec)
        except UserError as error:
            machine.append(str(error))
    lines = differing_fields(manifest.origin, asked)
    for name in ("source", "val_source"):
        kinds = {
            text.partition(" ")[0] for text in (getattr(manifest.origin, name), asked.get(name, ""))
        }
        if name in lines and len(kinds) == 1 and (name == "source" or kinds == {"stdlib"}):
            machine.append(lines.pop(name))
    return list(lines.values()), machine
