"""The evaluate command: every mode on a trained run, what it prints, and what it refuses."""

import hashlib
import json
import math
import shutil
import sys
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sngpt_jax.evaluation
from sngpt_jax import evaluate
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.spec import PrepareSpec
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.model.forward import forward
from sngpt_jax.weights.source import load_model
from tests import ngram_oracle

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
    bits = found["loss"] * TOKENS / math.log(2)
    assert found["bpb"] == pytest.approx(bits / found["bytes"], rel=1e-12)
    assert found["tok_per_s"] == pytest.approx(TOKENS / found["seconds"])
    standard = run(capsys, tiny_trained, "--tokens", TOKENS)
    assert (standard["tokens"], standard["windows"]) == (TOKENS // 32 * 32, TOKENS // 32)
    assert found["loss"] != standard["loss"]
    mesh = make_mesh(jax.devices()[:1])
    model = load_model(tiny_trained, mesh)
    data = model.open_data()
    own = score_validation(model.config, model.variables, data, mesh, TOKENS, stride=8)
    assert found["loss"] == pytest.approx(own.loss, rel=1e-6)  # eight devices and one
    sliding = ["--mode", "sliding", "--stride", 8, "--tokens", TOKENS, "--tail", "published"]
    again = run(capsys, tiny_trained, *sliding)
    assert again["tokens"] == 992 + 3 * 8  # 31 windows' targets, and three windows overrun the end


def test_a_score_names_its_data_as_the_training_did(capsys, tiny_trained, tiny_recipe):
    """By the SHA-256 in the manifest; the same tokens in files of their own have another name."""
    found = run(capsys, tiny_trained, "--tokens", 64)["data"]
    manifest = json.loads((tiny_recipe.parent / "data" / "manifest.json").read_text())
    shards = "\n".join(shard["sha256"] for shard in manifest["val"])
    digest = hashlib.sha256(shards.encode()).hexdigest()[:12]
    assert found == {"name": "data", "hash": digest}
    summary = json.loads((tiny_trained / "summary.json").read_text())
    assert found == {"name": summary["val_data"], "hash": summary["val_hash"]}
    assert summary["val_tokens"] == 2048
    options = ["--run", str(tiny_trained), "--tokens", "64"]
    assert evaluate.main(options) == 0
    assert f"data ({digest})" in capsys.readouterr().out


def data_folder(folder, tiny_recipe, tokens):
    shutil.copy(tiny_recipe.parent / "data" / "tokenizer.model", folder)
    np.full(1000, 5, "<u2").tofile(folder / "train.bin")
    np.asarray(tokens, "<u2").tofile(folder / "val.bin")
    return folder


@pytest.fixture(scope="module")
def repeating(tiny_recipe, tmp_path_factory):
    """A folder whose validation stream repeats 40 tokens, with noise: all caches find something."""
    rng = np.random.default_rng(0)
    noisy, noise = rng.random(2000) < 0.02, rng.integers(4, 320, 2000)
    tokens = np.where(noisy, noise, np.resize(rng.integers(4, 320, 40), 2000))
    return data_folder(tmp_path_factory.mktemp("repeating"), tiny_recipe, tokens)


@pytest.fixture(scope="module")
def read(tiny_trained, repeating):
    """The tokens, and the model's p [n, V] of the first TOKENS targets in windows of 32 with stride
    16, float64.
    """
    model = load_model(tiny_trained, make_mesh(jax.devices()[:1]))
    tokens = open_dataset(repeating, 320).val.take(0, TOKENS + 1).astype(int)
    starts = [min(max(0, -(-(target - 31) // 16) * 16), TOKENS - 32) for target in range(TOKENS)]
    first, row = np.unique(starts, return_inverse=True)
    inputs = jnp.asarray(tokens[first[:, None] + np.arange(32)])
    logits = jax.jit(forward(model.config.model))(model.variables, inputs)
    rows = np.asarray(logits, np.float64)[row, np.arange(TOKENS) - starts]
    return tokens.tolist(), np.exp(rows) / np.exp(rows).sum(1, keepdims=True)


def oracle(cache, tokens, p):
    """p' [n, V] of each mode, from tests/ngram_oracle.py."""
    targets, V = np.array(tokens[1:]), p.shape[1]
    if cache == "tilt":
        hints = np.array(ngram_oracle.hints(tokens))
        assert np.any(hints >= 0)
        lifted = np.where(np.arange(V)[None] == hints[:, None], p * math.exp(2.625), p)
        return lifted / lifted.sum(1, keepdims=True)
    if cache == "exact":
        of_targets = p[np.arange(len(p)), targets]
        weights, given = zip(*ngram_oracle.exact(tokens, of_targets, V), strict=True)
    else:
        entropy, segments = -(p * np.log(p)).sum(1), [32] + [16] * len(tokens)
        options = {"segments": segments, "buckets": 2**22}
        given, weights = ngram_oracle.hashed_mixture(cache, tokens, V, entropy, **options)
    w = np.array(weights)[:, None]
    return (1 - w) * p + w * np.array(given)


@pytest.mark.parametrize("cache", [*DISTRIBUTIONS, "undercount"])
def test_a_cache_and_the_mass_of_what_it_gives(capsys, tiny_trained, repeating, read, cache):
    """The command against the definition, from the shards to the score: segments, first token,
    hints, a fresh cache's mass.
    """
    options = ["backoff", "--ngram-undercount"] if cache == "undercount" else [cache]
    arguments = ["--data", repeating, "--mode", "sliding", "--stride", 16, "--tokens", TOKENS]
    found = run(capsys, tiny_trained, *arguments, "--ngram", *options)
    tokens, p = read
    mixed = oracle(cache, tokens, p)
    loss, loss_with_cache = (-np.log(x[range(TOKENS), tokens[1:]]).mean() for x in (p, mixed))
    with_cache, mass = found["ngram"], found["ngram"]["mass"]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert with_cache["loss"] == pytest.approx(loss_with_cache, rel=1e-6)
    assert with_cache["loss"] < found["loss"]
    masses = mixed.sum(1)
    assert mass["positions"] == TOKENS  # all of them
    for name, value in (("mean", masses.mean()), ("min", masses.min()), ("max", masses.max())):
        assert mass[name] == pytest.approx(value, rel=1e-5)
    assert mass["mean_log"] == pytest.approx(np.log(masses).mean(), rel=1e-4, abs=1e-6)
    bits = math.log(2) * found["bytes"] / TOKENS
    assert with_cache["bpb"] == pytest.approx(with_cache["loss"] / bits, rel=1e-12)
    normalized = (with_cache["loss"] + mass["mean_log"]) / bits
    assert with_cache["normalized_bpb"] == pytest.approx(normalized, rel=1e-12)


@pytest.mark.parametrize("cache", ["hashed5", "exact"])
def test_what_a_person_is_told_of_a_cache(capsys, tiny_trained, repeating, cache):
    options = ["--data", str(repeating), "--tokens", "320", "--ngram", cache]
    assert evaluate.main(["--run", str(tiny_trained), *options]) == 0
    out, err = capsys.readouterr()
    assert ("not a probability distribution" in out) == (not DISTRIBUTIONS[cache])
    assert "bits/byte (golf); mass of the vocabulary" in out
    [said] = [line for line in err.splitlines() if line.startswith(f"n-gram cache {cache}: ")]
    assert "iB" in said and said.endswith("readings for the mass")  # before it starts


def test_tasks_beside_a_stream_or_alone(capsys, tiny_trained, tmp_path):
    text = tmp_path / "lambada.txt"
    text.write_text("abc def abc def\nfed cba fed cba\n")
    found = run(capsys, tiny_trained, "--tasks", f"lambada={text}", "--mode", "none")
    assert found["tasks"]["lambada"]["samples"] == 2 and "loss" not in found
    options = ["--tokens", 64, "--task-limit", 1]
    found = run(capsys, tiny_trained, "--tasks", f"lambada={text}", *options)
    assert found["tasks"]["lambada"]["samples"] == 1 and "loss" in found


def test_a_task_that_cannot_run_leaves_the_others(capsys, tiny_trained, tmp_path):
    text = tmp_path / "lambada.txt"
    text.write_text("abc def abc def\n")
    spec = f"hellaswag={tmp_path}/none.jsonl,lambada={text}"
    with pytest.raises(UserError, match="^hellaswag: .*none.jsonl: cannot be read"):
        run(capsys, tiny_trained, "--tasks", spec, "--mode", "none")
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert found["lambada"]["samples"] == 1
    assert "none.jsonl: cannot be read" in found["hellaswag"]["error"]


@pytest.mark.parametrize(
    ("package", "found"),
    [("datasets", None), ("lm_eval", None), ("lm_eval", types.ModuleType("lm_eval"))],
)
def test_tasks_without_lm_eval_say_what_to_install(monkeypatch, tiny_trained, package, found):
    monkeypatch.setitem(sys.modules, package, found)
    for name in ("tasks", "task_files", "lm_eval_model"):
        monkeypatch.delitem(sys.modules, f"sngpt_jax.evaluation.{name}", raising=False)
        monkeypatch.delattr(sngpt_jax.evaluation, name, raising=False)
    with pytest.raises(UserError, match="--tasks needs the package lm-eval>=.* -m pip install"):
        evaluate.main(["--run", str(tiny_trained), "--tasks", "lambada=x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "8"], "--stride and --tail are for sliding windows"),
        (["--tail", "published"], "--stride and --tail are for sliding windows"),
        (["--mode", "sliding", "--stride", "33"], "--stride 33 is not between 1 and one window"),
        (["--mode", "sliding", "--stride", "0"], "--stride 0 is not between 1 and one window"),
        (["--mode", "sliding", "--tokens", "31"], "31 tokens to score are less than one window"),
        (["--tokens", "-1"], "cannot be negative"),
        (["--mode", "none"], "name --tasks"),
        (["--mode", "none", "--tasks", "lambada=x", "--tokens", "9"], "--tokens are for a stream"),
        (["--mode", "sliding", "--tail", "published", "--ngram", "exact"], "remove one of the two"),
        (["--ngram", "exact", "--ngram-undercount"], "--ngram-undercount is for --ngram backoff"),
        (["--ngram", "hashed5", "--ngram-memory", "1"], "--ngram-memory is for --ngram exact"),
        (
            ["--ngram", "exact", "--ngram-memory", "nan"],
            "memory nan is not a number of GiB above 0",
        ),
        (
            ["--ngram", "exact", "--ngram-memory", "1e300"],
            "1e\\+300 is not a number of GiB above 0",
        ),
        (["--json", "/proc/none/x.json"], "--json /proc/none/x.json: cannot be written"),
        (["--ngram", "exact", "--ngram-memory", "1e-6"], "too little memory"),
        (["--task-limit", "3"], "are for --tasks"),
        (["--tasks", "hellaswag=x,winogrande=y"], "winogrande=y: only hellaswag, lambada"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_trained, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(["--run", str(tiny_trained), *arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("published", [False, True])
def test_text_that_the_run_trained_on_is_refused(
    tiny_trained, tiny_recipe, tmp_path, capsys, published
):
    """The recipe's text, of which 20 documents are held out; as a folder of `prepare`, or bare."""
    home = tiny_recipe.parent
    text = (home / "text.txt").read_text()
    (tmp_path / "other.txt").write_text("other text")
    tokenizer = str(home / "data" / "tokenizer.model")
    spec = PrepareSpec(str(tmp_path / "other.txt"), str(tmp_path / "out"), tokenizer=tokenizer)
    prepare(replace(spec, val_source=str(home / "text.txt")))
    folder = tmp_path / "out"
    if published:
        tokens = open_dataset(folder, 320).val
        folder = data_folder(tmp_path, tiny_recipe, tokens.take(0, len(tokens)))
    options = ["--run", str(tiny_trained), "--data", str(folder), "--tokens", "320"]
    documents = text.count("<|endoftext|>") + 1
    message = f"the model was trained on {documents - 20} of its {documents} documents"
    with pytest.raises(UserError, match=message):
        evaluate.main(options)
    assert evaluate.main([*options, "--allow-overlap"]) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_streams_that_cannot_be_scored(tiny_trained, tiny_recipe, tmp_path):
    """None at all, one of marks, one shorter than a window, and one of another vocabulary."""
    for tokens, mode, message in (
        ([], "standard", "found 0 bytes"),
        ([1] * 100, "sliding", "stand for no text"),
        ([5] * 32, "standard", "has 32 tokens; one window needs"),
        ([320] + [5] * 97, "sliding", "expected tokens below the vocabulary size 320, found 320"),
    ):
        options = ["--data", str(data_folder(tmp_path, tiny_recipe, tokens)), "--mode", mode]
        with pytest.raises(UserError, match=message):
            evaluate.main(["--run", str(tiny_trained), *options])
    fine = data_folder(tmp_path, tiny_recipe, [5] * 100)
    assert open_dataset(fine, 320).val.vocab_size == 320
