"""Where text comes from: the interpreter's own library, files, Hugging Face; and the challenge's
published token shards.

A source is named by one string (`FORMS`). Its documents come in a fixed order, so that the first n
can be held out and an interrupted preparation can go on where it stopped. A source of several
files can be read in parts, each by another machine.
"""

import hashlib
import importlib
import io
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256, problem_of_name, shown
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.shards import DOWNLOAD, open_shard
from sngpt_jax.data.tokenizer import load_tokenizer, replace_surrogates

logger = logging.getLogger("sngpt_jax")

ENDINGS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FORMS = (
    "stdlib, hub:NAME[:CONFIG][@SPLIT], or a path to a folder or a file ending in"
    f" {', '.join(ENDINGS)}"
)
SEPARATOR = "<|endoftext|>"  # a line of a text file that holds only this ends a document

# bytes of a line, letters of a document: a small compressed file unpacks to any number of them
MAX_DOCUMENT = 2**30
_TOO_LONG = (
    f"a document that is longer than {MAX_DOCUMENT:,} bytes; put lines of {SEPARATOR} between"
    " documents"
)

# of a source: a Slurm array has at most 1001 tasks, unless the cluster says otherwise
MAX_PARTS = 1000

GOLF_REPO = "willdepueoai/parameter-golf"  # the Hugging Face data set with the challenge's shards

# text below this size is known by its content: hashing so much takes a fifth of a second
_HASHED_BYTES = 256 * 2**20
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
}
_HUB = re.compile(r"hub:(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>.+))?")


def documents(source: str, part: int = 0, parts: int = 1) -> Iterator[str]:
    """Yields the documents of `source` in their fixed order; empty ones are left out, lone
    surrogates become U+FFFD.

    With `parts`, at most `count_parts(source)`, only those of part `part`: a run of whole files.
    Parts 0, 1, …, one after the other, are all documents in their order. Raises `UserError` at the
    call for a source that is not there, and `DataError` on the way for text that is damaged.
    """

    def of_part(files: list[Path]) -> list[Path]:
        return files[len(files) * part // parts : len(files) * (part + 1) // parts]

    if source == "stdlib":
        texts = _stdlib_texts(of_part(_stdlib_files()))
    elif source.startswith("hub:"):
        texts = _hub_texts(*_hub_parts(source), part, parts)
    else:
        texts = (text for path in of_part(_text_files(source)) for text in _file_texts(path))
    return (replace_surrogates(text) for text in texts if text)


def count_parts(source: str) -> int:
    """How many parts `documents` can cut `source` into: one a file, but at most `MAX_PARTS`.
    Raises `UserError`.
    """
    if source.startswith("hub:"):
        files = _hub_files(*_hub_parts(source))
    else:
        files = len(_stdlib_files() if source == "stdlib" else _text_files(source))
    return min(files, MAX_PARTS)


def text_bytes(source: str) -> int:
    """How many bytes of text `source` holds, by its files' sizes; 0 where they do not tell. Raises
    `UserError`.
    """
    if source.startswith("hub:"):
        return 0
    files = _stdlib_files() if source == "stdlib" else _text_files(source)
    return (
        sum(path.stat().st_size for path in files)
        if all(path.suffix in (".py", ".txt") for path in files)
        else 0
    )


def fingerprint(source: str) -> str:
    """A short name for the content of `source`: its kind, how many files, and a hash of their
    names and contents.

    Text of 256 MiB or more is known by its files' names, sizes and modification times, a Hugging
    Face data set by its name. Where a folder lies does not matter.
    """
    if source.startswith("hub:"):
        name, config, split = _hub_parts(source)
        return f"hub:{name}:{config or 'default'}@{split}"
    if source == "stdlib":
        kind, root, files = f"stdlib {platform.python_version()}", _stdlib_root(), _stdlib_files()
    else:
        kind, root, files = "files", Path(source), _text_files(source)
        root = root if root.is_dir() else root.parent
    stats = [path.stat() for path in files]
    by_content = sum(stat.st_size for stat in stats) < _HASHED_BYTES
    digest = hashlib.sha256()
    for path, stat in zip(files, stats, strict=True):
        content = (
            file_sha256(path, DataError) if by_content else f"{stat.st_size} {stat.st_mtime_ns}"
        )
        digest.update(f"{path.relative_to(root).as_posix()}\0{content}\0".encode())
    return f"{kind}, {len(files)} files, {digest.hexdigest()[:16]}"


def imported(package: str, what: str) -> Any:
    """The module of an optional package that `what` needs. Raises `UserError` with the command
    that installs it.
    """
    # else it tells of every retry; the last failure is an exception
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not logger.isEnabledFor(logging.INFO):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        return importlib.import_module(package)
    except ImportError:
        pip = shlex.join([sys.executable, "-m", "pip", "install", package])
        raise UserError(f"{what} needs the package {package}; install it: {pip}") from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------------------------------------- the standard library


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    """The library's Python files without its tests, in the order of their relative paths' hashes:
    any prefix is a sample.
    """
    root = _stdlib_root()
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith("config-")
        ]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(
            f"source stdlib: no .py files under {root}; give a file or folder of text instead"
        )
    return sorted(
        files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    )


def _stdlib_texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            with tokenize.open(path) as file:  # decodes as PEP 263 says
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):
            # the library ships a few files in no or another encoding than they declare, as fixtures
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------- files


def _text_files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir() and source:  # Path("") is the current folder
        files = [p for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file()]
        if not files:
            raise UserError(
                f"{path}: no text in this folder; expected files ending in {', '.join(ENDINGS)}"
            )
        return sorted(files, key=lambda p: p.relative_to(path).as_posix())
    if path.is_file() and path.name.endswith(ENDINGS):
        return [path]
    if path.exists() and source:
        raise UserError(f"{path}: expected a file ending in {', '.join(ENDINGS)}")
    if source.startswith("golf:"):
        raise UserError(
            f"source {source}: published token shards hold no text; a source of text is {FORMS}"
        )
    raise UserError(f"source {source!r}: no such file or folder; a source is {FORMS}")


def _file_texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        return _parquet_texts(path)
    kind = path.suffixes[-2] if path.suffix in (".gz", ".zst") else path.suffix
    return _jsonl_texts(path) if kind == ".jsonl" else _txt_texts(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its end) of a plain or compressed file, without a byte
    order mark.
    """
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
        if codec and not path.stat().st_size:
            raise OSError("the file is empty")
        # reads on over members and frames
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=codec)) as file:
            for number, line in enumerate(
                iter(partial(file.readline, MAX_DOCUMENT + 1), b""), start=1
            ):
                if len(line) > MAX_DOCUMENT:
                    raise DataError(f"{path}:{number}: {_TOO_LONG}")
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start} of the"
                        " line"
                    ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read to its end: {' '.join(str(error).split())}"
        ) from None


def _txt_texts(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for number, line in _lines(path):
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(lines)
            lines, size = [], 0
        else:
            lines.append(line)
            size += len(line)
            if size > MAX_DOCUMENT:
                raise DataError(f"{path}:{number}: {_TOO_LONG}")
    yield "".join(lines)


def _jsonl_texts(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        yield _text_of(row, f"{path}:{number}")


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected an object with the key text, found {type(row).__name__}"
        )
    if "text" not in row:
        raise DataError(
            f"{where}: expected the key text, found"
            f" {', '.join(map(repr, list(row)[:8])) or 'no keys'}"
        )
    if not isinstance(row["text"], str):
        raise DataError(f"{where}: expected a string in text, found {type(row['text']).__name__}")
    return row["text"]


def _parquet_texts(path: Path) -> Iterator[str]:
    from pyarrow import parquet  # loads a large library that only this needs

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: expected a column text, found {', '.join(file.schema_arrow.names)}"
                )
            # decodes one row group's pages at a time
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    yield _text_of({"text": value.as_py()}, f"{path}: row {row}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: row {row}: not UTF-8: {error.reason} at byte {error.start} of the text"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a Parquet file, or a damaged one, after row {row}: {_one_line(error)}"
        ) from None


# ---------------------------------------------------------------------------------------------- Hugging Face


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    match = _HUB.fullmatch(source)
    if not match:
        raise UserError(
            f"source {source!r}: expected hub:NAME[:CONFIG][@SPLIT], such as"
            " hub:HuggingFaceFW/fineweb-edu@train"
        )
    return match["name"], match["config"], match["split"] or "train"


def _hub_files(name: str, config: str | None, split: str) -> int:
    datasets = imported("datasets", f"source hub:{name}")
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True).num_shards
    except Exception as error:  # whatever the network and the hub raise
        raise DataError(
            f"source hub:{name}: the data set's files cannot be listed: {_one_line(error)}"
        ) from None


def _hub_texts(name: str, config: str | None, split: str, part: int, parts: int) -> Iterator[str]:
    datasets = imported("datasets", f"source hub:{name}")
    row = 0
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=True)
        for values in data.shard(parts, part) if parts > 1 else data:  # a run of whole files
            row += 1
            yield _text_of(values, f"hub:{name}: row {row}")
    except UserError:
        raise
    except Exception as error:  # whatever the network, the hub and the data set's format raise
        raise DataError(
            f"source hub:{name}: the data set fails after row {row}: {_one_line(error)}"
        ) from None


def download_golf(out_dir: Path, *, vocab_size: int, train_shards: int) -> None:
    """Fetches the challenge's FineWeb tokens: all validation shards, the first `train_shards`
    training shards, the tokenizer.

    They land flat in `out_dir` as `fineweb_{train,val}_%06d.bin` and the tokenizer's `.model`.
    Whole files that are there already are kept, so that the same call goes on after an
    interruption. Layout: openai/parameter-golf, data/cached_challenge_fineweb.py. Raises
    `UserError` where the network fails or the data set lacks what is asked for.
    """
    hub = imported("huggingface_hub", f"the data set {GOLF_REPO}")

    def fetch(name: str, folder: Path) -> Path:
        if problem := problem_of_name(name):
            raise DataError(f"{GOLF_REPO}: its manifest names {shown(name)}, which {problem}")
        try:
            return Path(
                hub.hf_hub_download(
                    GOLF_REPO, f"datasets/{name}", repo_type="dataset", local_dir=folder
                )
            )
        except Exception as error:  # whatever the network and the hub raise
            raise UserError(
                f"{GOLF_REPO}: datasets/{name} cannot be fetched: {_one_line(error)}"
            ) from None

    with tempfile.TemporaryDirectory() as folder:
        dataset, model_path, shards = _golf_entry(fetch("manifest.json", Path(folder)), vocab_size)
    if not 1 <= train_shards <= shards["train"]:
        raise UserError(
            f"{GOLF_REPO}: {dataset} has {shards['train']} training shards; asked for"
            f" {train_shards}"
        )
    model = out_dir / PurePosixPath(model_path).name
    other = next((path for path in sorted(out_dir.glob("*.model")) if path != model), None)
    if other:
        raise UserError(
            f"{out_dir}: holds {other.name}; tokens of {model.name} go into another folder"
        )
    staging = out_dir / DOWNLOAD  # from here until its removal the folder counts as unfinished
    staging.mkdir(parents=True, exist_ok=True)
    if not model.is_file():
        fetched = fetch(model_path, staging)
        found = load_tokenizer(fetched).vocab_size
        if found != vocab_size:
            raise DataError(
                f"{GOLF_REPO}: {model_path}: expected a vocabulary of {vocab_size}, found {found}"
            )
        os.replace(fetched, model)
    for split, count in (("val", shards["val"]), ("train", train_shards)):
        for n in range(count):
            name = f"fineweb_{split}_{n:06d}.bin"
            if not _whole(out_dir / name):
                fetched = fetch(f"datasets/{dataset}/{name}", staging)
                open_shard(fetched)
                os.replace(fetched, out_dir / name)
    shutil.rmtree(staging)


def _whole(path: Path) -> bool:
    try:
        open_shard(path)
    except DataError:
        return False
    return True


def _golf_entry(manifest: Path, vocab_size: int) -> tuple[str, str, dict[str, int]]:
    """Name of the data set for `vocab_size`, path of its tokenizer, and how many shards each split
    has.
    """
    where = f"{GOLF_REPO}: datasets/manifest.json"
    try:
        values = typed_json.loads(manifest.read_bytes())
        by_name = {entry["name"]: entry for entry in values["datasets"]}
        name = f"fineweb10B_sp{vocab_size}"
        if name not in by_name:
            raise DataError(f"{where}: no {name}; it has {', '.join(sorted(by_name))[:500]}")
        tokenizer_name, stats = by_name[name]["tokenizer_name"], by_name[name]["stats"]
        models = {
            entry["name"]: str(entry["model_path"])
            for entry in values["tokenizers"]
            if "model_path" in entry
        }
        if tokenizer_name not in models:
            known = ", ".join(sorted(models))[:500]
            raise DataError(
                f"{where}: no SentencePiece tokenizer {shown(tokenizer_name)} for {name}; it has"
                f" {known}"
            )
        return (
            name,
            models[tokenizer_name],
            {"train": int(stats["files_train"]), "val": int(stats["files_val"])},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not the layout that this program knows: {_one_line(error)}"
        ) from None
