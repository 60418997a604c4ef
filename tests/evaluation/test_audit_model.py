"""The checks of runs and artifacts: what is right passes, and each check fails for its fault."""

import itertools
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from sngpt_jax import audit, export
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import changed
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.tokenizer import NO_CORRECTIONS
from sngpt_jax.evaluation.audit import probabilities, recount, result, text
from sngpt_jax.model.forward import join
from sngpt_jax.training.state import Shapes, init_state


@pytest.fixture(scope="module")
def config(tiny_recipe):
    return load(str(tiny_recipe))


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset(config.data.dir, config.model.vocab_size)


def documents_of(stream, bos_id):
    """The tokens of each document, as tuples, one token after the other."""
    found = []
    for token in stream.take(0, len(stream)).tolist():
        if token == bos_id:
            found.append([])
        else:
            found[-1].append(token)
    return [tuple(document) for document in found if document]


# ---------------------------------------- bytes and leaks


def test_spans_are_the_documents(dataset):
    bos, tokens = dataset.tokenizer.bos_id, dataset.val.take(0, len(dataset.val))
    spans = text.document_spans(tokens, bos)
    found = [tuple(tokens[first:end].tolist()) for first, end in spans]
    assert found == documents_of(dataset.val, bos)
    odd = np.array([7, bos, bos, 8, 9, bos])  # no text between the first two, and none at the end
    assert list(text.document_spans(odd, bos)) == [(3, 5)]


def test_bytes_are_those_of_the_source(dataset, tiny_recipe):
    size = sum(shard.source_bytes for shard in dataset.manifest.val)
    source = (tiny_recipe.parent / "text.txt").read_text()
    documents = [dataset.tokenizer.decode(x) for x in documents_of(dataset.val, 1)]
    assert all(document in source for document in documents)
    assert sum(len(document.encode()) for document in documents) == size
    table = text.judge_table(dataset)
    assert table.outcome == "passed" and table.figures["counted"]["text"] == size
    decoded = text.judge_decoded(dataset.val, dataset.tokenizer)
    assert decoded.outcome == "passed" and decoded.figures["decoded"] == size


@pytest.mark.parametrize("change", [1, -1])
def test_wrong_bytes_fail(dataset, monkeypatch, change):
    (first, *others) = dataset.manifest.val
    stated = replace(dataset.manifest, val=(replace(first, golf_bytes=1), *others))
    assert text.judge_table(replace(dataset, manifest=stated)).outcome == "failed"
    assert text.judge_table(replace(dataset, manifest=None)).outcome == "could not be made"

    tokenizer, table = dataset.tokenizer, dataset.tokenizer.token_bytes()
    wrong = replace(table, base=table.base + change)
    monkeypatch.setattr(tokenizer, "token_bytes", lambda: wrong)
    assert text.judge_table(dataset).outcome == "failed"
    for known in (True, False):
        check = text.judge_decoded(replace(dataset.val, text_known=known), tokenizer)
        assert check.outcome == "failed"
        assert check.figures["wrong"] == len(documents_of(dataset.val, tokenizer.bos_id))


def test_published_shards_are_counted_by_the_table_alone(dataset):
    """Without corrections, as the challenge's, and with a stream that has no BOS at all."""
    shards = [replace(shard, extra=NO_CORRECTIONS) for shard in dataset.val.shards]
    bare = replace(dataset.val, shards=tuple(shards), text_known=False)
    assert text.judge_decoded(bare, dataset.tokenizer).outcome == "passed"
    cut = [replace(shard, tokens=shard.tokens[1:9]) for shard in shards[:1]]
    check = text.judge_decoded(replace(bare, shards=tuple(cut)), dataset.tokenizer)
    assert check.row()[1] == "could not be made, because no document begins with the token 1, BOS"


def test_leaks_are_the_common_documents(dataset):
    check = text.judge_leak(dataset, dataset)
    assert check.outcome == "passed" and check.figures["in_training"] == 0
    val = documents_of(dataset.val, dataset.tokenizer.bos_id)
    leaked = text.judge_leak(dataset, replace(dataset, train=dataset.val))
    assert leaked.outcome == "failed" and leaked.figures["in_training"] == len(val)
    train = documents_of(dataset.train, dataset.tokenizer.bos_id)
    assert not set(val) & set(train)
    # one document of the training text, placed among those of the validation text
    one = np.array([dataset.tokenizer.bos_id, *train[5]], np.uint16)
    shard = replace(dataset.val.shards[-1], tokens=one, extra=NO_CORRECTIONS)
    mixed = replace(dataset.val, shards=(*dataset.val.shards, shard))
    leaked = text.judge_leak(replace(dataset, val=mixed), dataset)
    assert leaked.figures["in_training"] == 1 and leaked.figures["documents"] == len(val) + 1


# ---------------------------------------- probabilities


@pytest.fixture(scope="module")
def model(config):
    """The untrained model and its mesh."""
    mesh = make_mesh()
    state = init_state(Shapes.of(config, mesh))
    return join(state.params, state.statistics), mesh


def test_probabilities_sum_to_one(config, dataset, model):
    variables, mesh = model
    masses = probabilities.masses(config, variables, dataset.val, mesh)
    assert masses.shape == (8 * 32,) and np.abs(masses - 1).max() < 1e-5
    assert probabilities.judge_masses(masses, config.model).outcome == "passed"


def test_a_score_of_too_much_probability_fails(config, dataset, model, monkeypatch):
    """Each probability is 1.2 times too large, as a cache without a distribution makes them."""
    real = probabilities.make_eval_step

    def inflated(*arguments):
        step = real(*arguments)
        return lambda *given: {"nll": step(*given)["nll"] - math.log(1.2)}

    monkeypatch.setattr(probabilities, "make_eval_step", inflated)
    masses = probabilities.masses(config, model[0], dataset.val, model[1])
    np.testing.assert_allclose(masses, 1.2, rtol=1e-5)
    assert probabilities.judge_masses(masses, config.model).outcome == "failed"


@pytest.mark.parametrize(
    ("least", "most", "outcome"),
    [(0.9995, 1.0005, "passed"), (1.0, 1.35, "failed"), (0.5, 1.0, "failed")],
)
def test_mass_of_a_cache(least, most, outcome):
    mass = {"mean": 1.0, "min": least, "max": most, "mean_log": 0.0, "positions": 9}
    check = probabilities.judge_cache({"ngram": {"cache": "exact", "mass": mass}})
    assert check.outcome == outcome
    assert probabilities.judge_cache(None).outcome == "could not be made"


# ---------------------------------------- results


def test_a_summary_implies_its_bytes(dataset):
    windows = {"seq_len": 32, "stride": 16}
    counts, mistakes = recount.recount(dataset.val, dataset.tokenizer, "", 2048, **windows)
    right = counts[0].bytes
    for size, outcome in ((right, "passed"), (right + 2, "failed")):
        bpb = 3.4759976 * 2048 / math.log(2) / size
        assert result.judge_summary(3.4759976, bpb, 2048, counts, mistakes).outcome == outcome
    bpb = 3.4759976 * 2048 / math.log(2) / (mistakes[0].low * right)
    check = result.judge_summary(3.4759976, bpb, 2048, counts, mistakes)
    assert mistakes[0].name in check.text


def test_seeds_and_their_spread(config):
    seeds, scores = (1, 2, 5), (1.25, 1.5, 1.125)
    runs = {f"r{n}": changed(config, train={"seed": n}) for n in seeds}
    found = dict(zip(runs, scores, strict=True))
    check = result.judge_seeds(runs, found)
    assert check.outcome == "passed"
    assert check.figures["mean"] == pytest.approx(statistics.mean(scores))
    assert check.figures["standard_deviation"] == pytest.approx(statistics.stdev(scores))
    again = runs | {"r5": runs["r1"]}
    assert result.judge_seeds(again, found).text == "2 runs have the seed 1"
    other = runs | {"r5": changed(runs["r5"], model={"mlp_dim": 96})}
    check = result.judge_seeds(other, found)
    assert check.outcome == "failed" and "model.mlp_dim: 64 -> 96" in check.text
    one = dict(itertools.islice(found.items(), 1))
    assert result.judge_seeds(runs, one).outcome == "could not be made"


def test_size_counts_artifact_and_program(tmp_path):
    artifact, program = tmp_path / "m.sngpt", tmp_path / "m.pyz"
    artifact.write_bytes(b"a" * 900)
    assert "m.pyz is missing" in result.judge_size(artifact, program, 1000).row()[1]
    for size, outcome in ((100, "passed"), (101, "failed")):
        program.write_bytes(b"p" * size)
        check = result.judge_size(artifact, program, 1000)
        assert check.outcome == outcome and f"900 + {size} bytes" in check.text


# ---------------------------------------- the command


def audited(capsys, *arguments):
    status = audit.main([*map(str, arguments), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    return status, {check["name"]: check["outcome"] for check in checks}


def test_a_run_passes_every_check_that_can_be_made(tiny_trained, capsys):
    status, checks = audited(capsys, "--run", tiny_trained)
    unmade = {name for name, outcome in checks.items() if outcome == "could not be made"}
    assert status == 0 and unmade == {"with a cache", "seeds", "size"}
    assert checks.keys() - unmade == {
        "summary", "bytes by table", "bytes decoded", "leak", "probabilities",
    }  # fmt: skip


@pytest.mark.slow
def test_an_artifact_with_a_cache_without_a_distribution_fails(tiny_trained, tmp_path, capsys):
    out = tmp_path / "model.sngpt"
    assert export.main(["--run", str(tiny_trained), "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    status, checks = audited(capsys, "--artifact", out, "--ngram", "hashed5")
    assert status == 1 and checks["size"] == "passed"
    assert {name for name, outcome in checks.items() if outcome == "failed"} == {"with a cache"}
    out.with_suffix(".pyz").unlink()
    status, checks = audited(capsys, "--artifact", out, "--ngram", "exact")
    assert status == 0 and checks["size"] == "could not be made"
    assert checks["with a cache"] == "passed"
