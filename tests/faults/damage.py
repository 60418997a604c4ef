"""Files that are damaged, gone or not those they were: checkpoints, shards, tokenizers."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sngpt_jax.data.preparation import PrepareSpec, prepare
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from tests.faults.lab import Ended, Lab, Row

SEPARATOR = "\n<|endoftext|>\n"  # between the documents of the tiny run's text


def flip(path: Path, lab: Lab) -> None:
    """Changes one bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[lab.rng.randrange(len(content))] ^= 1 << lab.rng.randrange(8)
    path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    """The files below a folder that hold something."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def a_byte_of_the_latest_checkpoint(lab: Lab) -> Row:
    tried = 3 if lab.thorough else 1
    for _ in range(tried):
        run = lab.copy_of_reference("damaged")
        flip(lab.rng.choice(files_of(run / "checkpoints" / "00000040")), lab)
        done = lab.run(lab.training(run))
        assert done.status == 0 and "resuming after step 38" in done.out, done
        (said,) = [line for line in done.err.splitlines() if "00000040" in line]
        assert "00000038" in said
        lab.goes_on_to_the_same(run)
    return Row(
        "a byte of the latest checkpoint is flipped",
        "The training loads the checkpoint before and prints one line of warning.",
        said,
        "0",
        tried,
    )


def a_byte_of_every_checkpoint(lab: Lab) -> Row:
    run = lab.copy_of_reference("damaged")
    for folder in (run / "checkpoints").iterdir():
        if folder.is_dir():
            flip(max(files_of(folder), key=lambda path: path.stat().st_size), lab)
    before = files_of(run)
    done = lab.run(lab.training(run))
    assert done.status == 2 and files_of(run) == before
    return Row(
        "a byte of every checkpoint is flipped",
        "The training refuses to start and changes no file.",
        done.error,
        "2",
        lost="the run",
    )


@contextlib.contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """The file or folder as it is comes back after the body."""
    kept = path.with_name(f"{path.name}.kept")
    (shutil.copytree if path.is_dir() else shutil.copy2)(path, kept)
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        kept.rename(path)


def refused_and_then_gone_on_with(lab: Lab, damaged: Path, damage: Callable[[], object]) -> Ended:
    """A run is killed, `damage` done to `damaged`, the run refused. Undamaged it goes on."""
    run = lab.fresh("of_changed_data")
    saved = run / "checkpoints" / "00000006.json"
    assert lab.kill_at(lab.start(lab.training(run)), saved.exists)
    with set_aside(damaged):
        damage()
        done = lab.run(lab.training(run))
        assert done.status == 2, done
    lab.goes_on_to_the_same(run)
    return done


def a_missing_shard(lab: Lab) -> Row:
    shard = lab.data / "train_000000.bin"
    done = refused_and_then_gone_on_with(lab, shard, shard.unlink)
    return Row(
        "a shard is missing",
        "The training refuses to start. It resumes once the shard is back.",
        done.error,
        "2",
    )


def a_changed_shard(lab: Lab) -> Row:
    shard = lab.data / "train_000000.bin"
    done = refused_and_then_gone_on_with(lab, shard, lambda: flip(shard, lab))
    return Row(
        "a shard is changed after the run began",
        "The training refuses the shard by its checksum and resumes once the shard is restored. For"
        " data of 64 MiB and more, only `prepare --verify` compares checksums.",
        done.error,
        "2",
    )


def documents_of(lab: Lab) -> list[str]:
    return (lab.recipe.parent / "text.txt").read_text().split(SEPARATOR)


def other_data(lab: Lab) -> Row:
    """The folder is prepared anew, of other text, with the same tokenizer."""
    text = lab.folder / "other.txt"
    text.write_text(SEPARATOR.join(documents_of(lab)[:200]))
    tokenizer = shutil.copy(lab.data / "tokenizer.model", lab.folder / "same.model")

    def prepare_other() -> None:
        shutil.rmtree(lab.data)
        source, out = str(text), str(lab.data)
        spec = PrepareSpec(source=source, out=out, val_docs=20, tokenizer=str(tokenizer))
        prepare(spec, workers=1)

    done = refused_and_then_gone_on_with(lab, lab.data, prepare_other)
    return Row(
        "the data folder is prepared again from other text",
        "The training refuses to start. It resumes once the former data are back.",
        done.error,
        "2",
    )


def another_tokenizer(lab: Lab) -> Row:
    """In the data folder, and in the run's own copy."""
    other = lab.folder / "other.model"
    train_sentencepiece(documents_of(lab)[:100], other, vocab_size=320, normalization="identity")
    kept = lab.data / "tokenizer.model"
    done = refused_and_then_gone_on_with(lab, kept, lambda: shutil.copy(other, kept))
    run = lab.copy_of_reference("swapped")
    shutil.copy(other, run / "tokenizer.model")
    again = lab.run(lab.training(run))
    assert again.status == 2 and again.error, again
    return Row(
        "the tokenizer is replaced, in the data or in the run",
        "The training refuses to start.",
        done.error,
        "2",
        2,
    )
