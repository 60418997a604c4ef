"""The data a recipe names: prepared, refused, and stopped on the way."""

import json
import logging
import random
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config, DataConfig, ModelConfig
from sngpt_jax.config.recipe import load
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.prepared import from_folder, prepared_data, spec_of
from sngpt_jax.data.shards import write_shard
from sngpt_jax.data.spec import COMMAND

VOCAB = 280
WORDS = ["river", "stone", "snow", "of", "the"]


@pytest.fixture
def config(tmp_path):
    """A recipe whose text is there and whose data are not."""
    texts = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(40)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    folder, source = str(tmp_path / "data"), str(tmp_path / "text.txt")
    data = DataConfig(dir=folder, source=source, val_docs=5, normalization="identity")
    return with_vocab(Config(data=data), VOCAB)


def with_vocab(config, size):
    return replace(config, model=ModelConfig(vocab_size=size))


@pytest.fixture
def prepared(config):
    prepare(spec_of(config))
    return config


def changed(config, **data):
    return replace(config, data=replace(config.data, **data))


def refusal(config):
    with pytest.raises(UserError) as caught:
        prepared_data(config)
    return str(caught.value)


# ---------------------------------------- ready or not


def test_a_half_fetched_folder_is_not_trained_on(config, tmp_path):
    (tmp_path / "data" / ".download").mkdir(parents=True)
    for split in ("val", "train"):
        write_shard(tmp_path / "data" / f"fineweb_{split}_000000.bin", np.ones(9, np.uint16))
    for source, vocab_size in (("golf", 2048), ("golf:sp1024", 1024)):
        asked = with_vocab(changed(config, source=source), vocab_size)
        message = refusal(asked)
        assert str(tmp_path / "data") in message and "--data.dir DIR" in message
        command = cli.command(COMMAND, "--source", source, "--out", str(tmp_path / "data"))
        assert command in message and f"--vocab-size {vocab_size}" in message
    assert "has not finished" in refusal(changed(config, source=""))


def test_a_command_to_paste_names_this_interpreter_and_quotes(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(changed(config, source="hub:a/b@train", dir="my data"))
    assert message.startswith(f"data.dir: {tmp_path / 'my data'} has no whole data")
    words = shlex.split(message.partition("run: ")[2].partition(", or say")[0])
    assert words[:3] == [sys.executable, "-m", "sngpt_jax.prepare"]
    assert words[words.index("--out") + 1] == "my data"


def test_data_are_prepared_once(config):
    data = prepared_data(config)
    assert data.tokenizer.vocab_size == VOCAB and len(data.train) > len(data.val) > 0
    assert prepared_data(config).manifest == data.manifest


# ---------------------------------------- prepared otherwise


@pytest.fixture
def warned(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("sngpt_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "sngpt_jax")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"val_docs": 6}, "val_docs: 5 there, 6 asked for"),
        ({"normalization": "nmt_nfkc"}, "normalization: 'identity' there, 'nmt_nfkc' asked for"),
        ({"val_source": "stdlib"}, "val_source: '' there, 'stdlib "),
        ({"source": "stdlib"}, "source: 'files, 1 files"),
        ({"tokenizer": "data/tokenizer.model"}, "tokenizer: 'train' there, 'sha256:"),
    ],
)
def test_data_of_other_settings_are_refused(prepared, tmp_path, monkeypatch, change, field):
    monkeypatch.chdir(tmp_path)
    message = refusal(changed(prepared, **change))
    assert field in message and "choose another --data.dir" in message


def test_a_learnt_vocabulary_has_the_models_size(prepared):
    assert "vocab_size: 280 there, 300 asked for" in refusal(with_vocab(prepared, 300))
    message = refusal(with_vocab(prepared, 270))
    assert "expected at most model.vocab_size = 270 tokens, found 280" in message


def given_tokenizer(config, tmp_path):
    path = str(tmp_path / "data" / "tokenizer.model")
    return changed(config, dir=str(tmp_path / "given"), tokenizer=path)


def test_a_given_vocabulary_may_be_smaller_than_the_models(prepared, tmp_path):
    given = given_tokenizer(prepared, tmp_path)
    message = refusal(with_vocab(given, 270))
    assert "tokenizer.model: expected at most --vocab-size 270 tokens, found 280" in message
    assert not (tmp_path / "given").exists()
    data = prepared_data(with_vocab(given, 300))
    assert data.tokenizer.vocab_size == data.train.vocab_size == VOCAB
    assert prepared_data(with_vocab(given, VOCAB)).manifest == data.manifest
    assert "expected at most model.vocab_size = 270" in refusal(with_vocab(given, 270))
    # without a manifest nobody knows who learned it
    bare, folder = changed(prepared, source=""), tmp_path / "data"
    (folder / "manifest.json").unlink()
    for split in ("train", "val"):
        (folder / f"{split}_000000.bin").rename(folder / f"a_{split}_0.bin")
    assert prepared_data(with_vocab(bare, 300)).tokenizer.vocab_size == VOCAB


def test_a_text_that_is_gone_or_edited_is_only_told(prepared, tmp_path, warned):
    prepared_data(prepared)
    assert warned() == []
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:-1] + "!")
    prepared_data(prepared)
    (tmp_path / "text.txt").unlink()
    assert "val_docs: 5 there" in refusal(changed(prepared, val_docs=6))
    prepared_data(prepared)
    edited, gone = warned()
    assert "used as it is" in edited and "source: 'files, 1 files" in edited
    assert "used as it is" in gone and "no such file or folder" in gone


def test_the_library_of_another_python_is_only_told(prepared, tmp_path, warned):
    path = tmp_path / "data" / "manifest.json"
    values = json.loads(path.read_text())
    source, val_source = "stdlib 3.9.0, 3 files, 00", "stdlib 3.9.0, 2 files, 00"
    values["origin"] |= {"source": source, "val_source": val_source, "val_docs": 0}
    path.write_text(json.dumps(values))
    prepared_data(changed(prepared, source="stdlib", val_source="stdlib"))
    (line,) = warned()
    assert source in line and val_source in line


# ---------------------------------------- a folder that the user named


def named(config, folder, *fields, **data):
    """`config` as `--data.dir folder` and options of the other fields make it."""
    return from_folder(changed(config, dir=str(folder), **data), {"data.dir", *fields})


def test_a_named_folder_says_what_the_recipe_need_not(prepared):
    recipe, folder = load("quickstart"), prepared.data.dir
    assert "prepared with other settings" in refusal(changed(recipe, dir=folder))
    config = named(recipe, folder)
    changes = {"source": "", "dir": folder, "val_docs": 5}
    assert config == with_data(recipe, VOCAB, **changes)
    assert len(prepared_data(config).val) > 0
    agreeing = with_data(recipe, VOCAB, dir=folder, source=prepared.data.source, val_docs=5)
    assert named(agreeing, folder) == agreeing  # where nothing differs, nothing changes
    elsewhere = changed(recipe, dir=folder)
    assert from_folder(elsewhere, {"data.source"}) is elsewhere


def with_data(config, vocab_size, **data):
    model = replace(config.model, vocab_size=vocab_size)
    return changed(replace(config, model=model), **data)


def test_the_split_of_a_named_folder_is_taken(config, tmp_path):
    given = {"val_docs": 0, "val_fraction": 0.25, "split_seed": 3, "max_tokens": 500}
    folder = tmp_path / "data"
    prepare(spec_of(changed(config, **given)))
    recipe = load("quickstart")
    assert named(recipe, folder) == with_data(recipe, VOCAB, source="", dir=str(folder), **given)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"val_docs": 6}, "val_docs: 5 there, 6 asked for"),
        ({"val_docs": 0, "val_fraction": 0.5}, "val_docs: 5 there, 0 asked for; val_fraction: 0.0"),
        ({"normalization": "nmt_nfkc"}, "normalization: 'identity' there"),
        ({"max_tokens": 7}, "max_tokens: 0 there, 7 asked for"),
        ({"source": "stdlib"}, "source: 'files, 1 files"),
        ({"tokenizer": "data/tokenizer.model"}, "tokenizer: 'train' there"),
        ({"vocab_size": 300}, "vocab_size: 280 there, 300 asked for"),
    ],
)
def test_options_that_contradict_the_named_folder_are_refused(
    prepared, tmp_path, monkeypatch, data, line
):
    monkeypatch.chdir(tmp_path)
    fields = [f"model.{name}" if name == "vocab_size" else f"data.{name}" for name in data]
    recipe = with_data(load("quickstart"), data.pop("vocab_size", 1024), **data)
    with pytest.raises(UserError, match="prepared otherwise .*; leave these options out") as caught:
        named(recipe, "data", *fields)
    assert line in str(caught.value)


def test_options_that_agree_with_the_named_folder_are_taken(prepared):
    recipe, folder = load("quickstart"), prepared.data.dir
    fields = ("data.val_docs", "data.source", "data.normalization", "model.vocab_size")
    agreeing = with_data(recipe, VOCAB, val_docs=5, source=prepared.data.source)
    assert prepared_data(named(agreeing, folder, *fields)).manifest


@pytest.mark.parametrize("manifest", [True, False])
def test_a_table_may_be_a_little_larger_than_a_given_tokenizer(prepared, tmp_path, manifest):
    given = given_tokenizer(prepared, tmp_path)
    folder = tmp_path / "given"
    prepare(spec_of(given))
    if not manifest:
        (folder / "manifest.json").unlink()
        for split in ("train", "val"):
            (folder / f"{split}_000000.bin").rename(folder / f"a_{split}_0.bin")
    recipe = load("quickstart")
    for rows, expected in ((270, VOCAB), (VOCAB, VOCAB), (407, 407), (408, VOCAB), (1024, VOCAB)):
        config = named(with_vocab(recipe, rows), folder)
        assert config.model.vocab_size == expected and config.data.source == ""
        assert prepared_data(config).tokenizer.vocab_size == VOCAB
    assert named(with_vocab(recipe, 999), folder, "model.vocab_size").model.vocab_size == 999
    small = named(with_vocab(recipe, 270), folder, "model.vocab_size")
    assert "expected at most model.vocab_size = 270" in refusal(small)
    golf = named(load("golf_baseline"), folder)
    assert golf.data.source == ("" if manifest else "golf")


def test_a_named_folder_without_whole_data_is_refused(config, tmp_path):
    for message in ("no such folder", "found none", "has not finished"):
        with pytest.raises(UserError, match=message):
            named(config, tmp_path / "data")
        (tmp_path / "data").mkdir(exist_ok=True)
        if message == "found none":
            (tmp_path / "data" / "progress.json").touch()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["progress.json"]


# ---------------------------------------- stopped on the way

STOPPED = """
import sys, time
from sngpt_jax.base import cli
from sngpt_jax.config import Config, DataConfig
from sngpt_jax.data import prepared
prepared.prepare = lambda *_: (print("preparing", flush=True), time.sleep(60))
cli.run(lambda argv: prepared.prepared_data(Config(data=DataConfig(dir=argv[0], source="stdlib"))))
"""


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "interrupted\n")]
)
def test_a_signal_ends_a_preparation_quietly(tmp_path, number, status, said):
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "data")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "preparing\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == said
    assert process.returncode == status


def test_a_failed_preparation_leaves_the_signals_as_they_were(config):
    before = signal.getsignal(signal.SIGTERM)
    assert "--val-docs 40 leaves none to train on" in refusal(changed(config, val_docs=40))
    assert signal.getsignal(signal.SIGTERM) is before
