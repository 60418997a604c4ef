"""The evaluate command: every mode on a trained run, what it prints, and what it refuses."""

import json
import math

import jax
import numpy as np
import pytest

from sngpt_jax import evaluate
from sngpt_jax.cli import UserError
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.parallel import make_mesh
from sngpt_jax.run_directory import load_model
from tests import tiny_run

pytestmark = pytest.mark.slow

TOKENS = 1000  # not a multiple of a window's 32
DISTRIBUTIONS = {"hashed5": False, "backoff": False, "exact": True, "tilt": True}


def run(capsys, tiny_trained, *arguments):
    capsys.readouterr()
    assert evaluate.main(["--run", str(tiny_trained), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_sliding_windows(capsys, tiny_trained):
    found = run(capsys, tiny_trained, "--mode", "sliding", "--stride", 8, "--tokens", TOKENS)
    assert (found["tokens"], found["mode"], found["stride"]) == (TOKENS, "sliding", 8)
    assert found["windows"] == (TOKENS - 32) // 8 + 1
    assert found["bytes_per_token"] == found["bytes"] / TOKENS
    assert found["bpb"] == pytest.approx(found["loss"] * TOKENS / math.log(2) / found["bytes"], rel=1e-12)
    assert found["tok_per_s"] == pytest.approx(TOKENS / found["seconds"])
    standard = run(capsys, tiny_trained, "--tokens", TOKENS)
    assert (standard["tokens"], standard["windows"]) == (TOKENS // 32 * 32, TOKENS // 32)
    assert found["loss"] != standard["loss"]
    model = load_model(tiny_trained, make_mesh(jax.devices()[:1]))
    own = score_validation(model.config, model.variables, model.open_data(), make_mesh(jax.devices()[:1]), TOKENS, stride=8)
    assert found["loss"] == pytest.approx(own.loss, rel=1e-6)  # eight devices and one
    again = run(capsys, tiny_trained, "--mode", "sliding", "--stride", 8, "--tokens", TOKENS, "--tail", "published")
    assert again["tokens"] == 992 + 3 * 8  # 31 windows' targets, and three windows overrun the end


@pytest.mark.parametrize("cache", DISTRIBUTIONS)
def test_a_cache_and_the_mass_of_what_it_gives(capsys, tiny_trained, cache):
    arguments = ("--mode", "sliding", "--stride", 16, "--tokens", TOKENS)
    alone = run(capsys, tiny_trained, *arguments)
    found = run(capsys, tiny_trained, *arguments, "--ngram", cache)
    assert found["loss"] == alone["loss"] and found["bpb"] == alone["bpb"]
    with_cache, mass = found["ngram"], found["ngram"]["mass"]
    assert with_cache["cache"] == cache and mass["positions"] == TOKENS
    assert with_cache["is_distribution"] == DISTRIBUTIONS[cache]
    if DISTRIBUTIONS[cache]:
        assert mass["min"] == pytest.approx(1, abs=1e-5) and mass["max"] == pytest.approx(1, abs=1e-5)
    if cache == "hashed5":  # every position is a probe: the literal score of p' / Σ p'
        assert with_cache["normalized_bpb"] == pytest.approx(
            (with_cache["loss"] + mass["mean_log"]) * TOKENS / math.log(2) / found["bytes"], rel=1e-12
        )
    assert with_cache["bpb"] == pytest.approx(with_cache["loss"] * TOKENS / math.log(2) / found["bytes"], rel=1e-12)
    alone_again = tiny_run.run("evaluate", "--run", tiny_trained, *arguments, "--ngram", cache)
    assert alone_again.returncode == 0, alone_again.stderr
    assert f"{with_cache['bpb']:.4f} bits/byte" in alone_again.stdout  # one device, one cache
    assert ("not a probability distribution" in alone_again.stdout) == (not DISTRIBUTIONS[cache])
    assert "n-gram cache" in alone_again.stderr  # said before it starts, with its memory


def test_tasks_beside_a_stream_or_alone(capsys, tiny_trained, tmp_path):
    text = tmp_path / "lambada.txt"
    text.write_text("abc def abc def\nfed cba fed cba\n")
    found = run(capsys, tiny_trained, "--tasks", f"lambada={text}", "--mode", "none")
    assert found["tasks"]["lambada"]["samples"] == 2 and "loss" not in found
    found = run(capsys, tiny_trained, "--tasks", f"lambada={text}", "--tokens", 64, "--task-limit", 1)
    assert found["tasks"]["lambada"]["samples"] == 1 and "loss" in found


def test_a_task_that_cannot_run_leaves_the_others(tiny_trained, tmp_path):
    text = tmp_path / "lambada.txt"
    text.write_text("abc def abc def\n")
    spec = f"hellaswag={tmp_path}/none.jsonl,lambada={text}"
    done = tiny_run.run("evaluate", "--run", tiny_trained, "--tasks", spec, "--mode", "none", "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)["tasks"]
    assert found["lambada"]["samples"] == 1 and "none.jsonl: cannot be read" in found["hellaswag"]["error"]
    assert done.stderr.splitlines()[-1].startswith("error: hellaswag: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "8"], "--stride and --tail are of sliding windows"),
        (["--tail", "published"], "--stride and --tail are of sliding windows"),
        (["--mode", "sliding", "--stride", "33"], "--stride 33 is not between 1 and one window"),
        (["--mode", "sliding", "--stride", "0"], "--stride 0 is not between 1 and one window"),
        (["--mode", "sliding", "--tokens", "31"], "31 tokens to score are less than one window"),
        (["--tokens", "-1"], "cannot be negative"),
        (["--mode", "none"], "name --tasks"),
        (["--mode", "none", "--tasks", "lambada=x", "--ngram", "exact"], "--ngram and --tokens are of a stream"),
        (["--mode", "sliding", "--tail", "published", "--ngram", "exact"], "leave one of them out"),
        (["--ngram", "exact", "--ngram-undercount"], "--ngram-undercount is of --ngram backoff"),
        (["--ngram", "hashed5", "--ngram-memory", "1"], "--ngram-memory is of --ngram exact"),
        (["--ngram", "exact", "--ngram-memory", "nan"], "not a positive number of GiB"),
        (["--ngram", "exact", "--ngram-memory", "1e-6"], "too little memory"),
        (["--task-limit", "3"], "are of --tasks"),
        (["--tasks", "hellaswag=x,winogrande=y"], "winogrande=y: of the tasks that read a file"),
        (["--tasks", "no_such_task"], "no_such_task"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_trained, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(["--run", str(tiny_trained), *arguments])
    assert "\n" not in str(error.value)


def test_streams_that_cannot_be_scored(tiny_trained, tiny_recipe, tmp_path):
    """None at all, one shorter than a window, and one of another vocabulary."""
    tokenizer = (tiny_recipe.parent / "data" / "tokenizer.model").read_bytes()

    def folder(name, tokens):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(tokenizer)
        np.full(1000, 5, "<u2").tofile(tmp_path / name / "train.bin")
        np.asarray(tokens, "<u2").tofile(tmp_path / name / "val.bin")
        return str(tmp_path / name)

    for name, tokens, message in (
        ("empty", [], "found 0 bytes"),
        ("short", [5] * 32, "has 32 tokens; one window needs"),
        ("foreign", [5, 5, 5, 320] + [5] * 97, "expected tokens below the vocabulary size 320, found 320"),
    ):
        for mode in ("standard", "sliding"):
            with pytest.raises(UserError, match=message):
                evaluate.main(["--run", str(tiny_trained), "--data", folder(f"{name}_{mode}", tokens), "--mode", mode])
    assert open_dataset(folder("fine", [5] * 100), 320).val.vocab_size == 320
