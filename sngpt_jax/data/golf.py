"""The challenge's published token shards: downloaded instead of prepared."""

import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import visible
from sngpt_jax.base.untrusted import problem_of_name, shown
from sngpt_jax.data.corpus import imported
from sngpt_jax.data.manifest import DataError, explained
from sngpt_jax.data.shards import DOWNLOAD, Dataset, open_dataset, open_shard
from sngpt_jax.data.spec import DEFAULT_VOCAB_SIZE, PrepareSpec, check_size, option
from sngpt_jax.data.tokenizer import load_tokenizer

logger = logging.getLogger("sngpt_jax")

REPO = "willdepueoai/parameter-golf"  # the Hugging Face data set with the challenge's shards
GOLF_DOCUMENTS = 50_000  # the first ones, which the challenge holds out


def fetch_golf(spec: PrepareSpec, train_shards: int) -> Dataset:
    """Downloads the published shards and tokenizer of `golf[:spV]` into `spec.out`, and opens them.

    V is the vocabulary size, at most `spec.vocab_size`. Without V it is `spec.vocab_size` or 1024.
    """
    what, named = f"--source {spec.source}", spec.source.removeprefix("golf").removeprefix(":")
    if named and not (named.startswith("sp") and named[2:].isdecimal()):
        raise UserError(f"{what}: expected golf or golf:spV with a vocabulary size V")
    vocab_size = int(named[2:]) if named else spec.vocab_size or DEFAULT_VOCAB_SIZE
    check_size(spec, what, vocab_size)
    plain = asdict(PrepareSpec(spec.source, spec.out, vocab_size=spec.vocab_size))
    if spec.val_docs == GOLF_DOCUMENTS:
        plain["val_docs"] = GOLF_DOCUMENTS
    if other := [option(key) for key, value in plain.items() if getattr(spec, key) != value]:
        raise UserError(f"{what} is already tokens; it takes no {', '.join(other)} but its own")
    logger.info(f"{spec.out}: downloading the published shards of {vocab_size:,} tokens")
    download(Path(spec.out), vocab_size=vocab_size, train_shards=train_shards)
    return open_dataset(spec.out, vocab_size)


def download(out_dir: Path, *, vocab_size: int, train_shards: int) -> None:
    """Downloads all validation shards, the first `train_shards` training shards, and the tokenizer.

    The files are `fineweb_{train,val}_%06d.bin` and the tokenizer's `.model` in `out_dir`. Whole
    files stay, so that the same call resumes. Layout: openai/parameter-golf,
    data/cached_challenge_fineweb.py. Raises `UserError` if the network fails or the data set lacks
    what is asked for.
    """
    hub = imported("huggingface_hub", f"the data set {REPO}")

    def fetch(name: str, folder: Path) -> Path:
        if problem := problem_of_name(name):
            raise DataError(f"{REPO}: its manifest names {shown(name)}, which {problem}")
        file = f"datasets/{name}"
        with explained(lambda: f"{REPO}: {file} cannot be fetched"):
            return Path(hub.hf_hub_download(REPO, file, repo_type="dataset", local_dir=folder))

    with tempfile.TemporaryDirectory() as folder:
        dataset, model_path, shards = _entry(fetch("manifest.json", Path(folder)), vocab_size)
    if not 1 <= train_shards <= shards["train"]:
        found = f"{dataset} has {shards['train']} training shards"
        raise UserError(f"{REPO}: {found}; asked for {train_shards}")
    model = out_dir / PurePosixPath(model_path).name
    if other := [path.name for path in visible(out_dir, "*.model") if path != model]:
        raise UserError(f"{out_dir}: holds {other[0]}; {model.name} goes into another folder")
    staging = out_dir / DOWNLOAD  # until its removal the folder counts as unfinished
    staging.mkdir(parents=True, exist_ok=True)
    if not model.is_file():
        fetched = fetch(model_path, staging)
        if (size := load_tokenizer(fetched).vocab_size) != vocab_size:
            raise DataError(f"{REPO}: {model_path}: expected {vocab_size} tokens, found {size}")
        os.replace(fetched, model)
    for split, count in (("val", shards["val"]), ("train", train_shards)):
        for n in range(count):
            name = f"fineweb_{split}_{n:06d}.bin"
            try:
                open_shard(out_dir / name)
            except DataError:  # missing, or not whole
                fetched = fetch(f"datasets/{dataset}/{name}", staging)
                open_shard(fetched)
                os.replace(fetched, out_dir / name)
    shutil.rmtree(staging)


def _entry(manifest: Path, vocab_size: int) -> tuple[str, str, dict[str, int]]:
    """The data set for `vocab_size`: its name, its tokenizer's path, and the shards per split."""
    where, name = f"{REPO}: datasets/manifest.json", f"fineweb10B_sp{vocab_size}"
    with explained(lambda: f"{where}: not the layout that this program knows"):
        values = typed_json.loads(manifest.read_bytes())
        sets = {entry["name"]: entry for entry in values["datasets"]}
        models = {x["name"]: str(x.get("model_path", "")) for x in values["tokenizers"]}
        if name not in sets:
            raise DataError(f"{where}: no {name}; it has {', '.join(sorted(sets))[:500]}")
        tokenizer, stats = sets[name]["tokenizer_name"], sets[name]["stats"]
        if not models.get(tokenizer):
            raise DataError(f"{where}: no SentencePiece model of {shown(tokenizer)} for {name}")
        files = {split: int(stats[f"files_{split}"]) for split in ("train", "val")}
        return name, models[tokenizer], files
