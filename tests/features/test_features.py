"""The feature study: models cut to their first levels, activations, what is read of a stream, and
the page as it is drawn.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels.cayley.dictionary import atoms

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import ModelConfig, parse_levels
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.evaluation.windows import Windows
from sngpt_jax.features.__main__ import main, parse_layers
from sngpt_jax.features.page import page, truncated
from sngpt_jax.features.study import BOS_MARK, Slice, make_selections, study_slice, text_reader
from sngpt_jax.model.forward import init_variables, join, losses, tapped_losses
from sngpt_jax.weights.trained_model import TrainedModel
from tests.browser import DESKTOP, PHONE, needs_browser, opened

CONFIG = ModelConfig(
    family="pre_norm",
    vocab_size=320,
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=32,
    mlp_activation="gelu",
    levels=parse_levels("4,3,0;6,4,16;8,5,16"),
    max_seq_len=32,
    positions="learned",
    qk_norm=False,
    matrix_init="normal",
    matrix_init_std=0.3,
    embed_init_std=0.5,
    logit_soft_cap=0.0,
)
T = 32


@pytest.fixture(scope="module")
def variables():
    """Those of an untrained model, with statistics and biases as training could leave them."""
    rng = np.random.default_rng(0)
    tree = join(*init_variables(CONFIG, jax.random.key(0)))
    for block in tree["blocks"].values():
        block["code"]["mean"] = jnp.asarray(rng.normal(0, 0.1, 16), jnp.float32)
        block["code"]["std"] = jnp.asarray(rng.uniform(0.5, 1.5, 256), jnp.float32)
        block["code"]["bias"] = jnp.asarray(rng.normal(0, 0.2, 256), jnp.float32)
    return tree


@pytest.fixture(scope="module")
def dataset(tiny_recipe):
    return open_dataset(tiny_recipe.parent / "data", 320)


def tokens_BT(dataset, rows):
    return jnp.asarray(dataset.val.take(0, rows * T).reshape(rows, T).astype(np.int32))


whole_losses = jax.jit(losses(CONFIG))


def test_levels_left_out_are_features_without_activation(variables, dataset):
    """A bias that no score outweighs takes a feature's activation away, in the whole model."""
    inputs = tokens_BT(dataset, 4)
    targets = jnp.roll(inputs, -1, axis=1)
    cut_config, cut = truncated(CONFIG, variables, 1)
    silenced = jax.tree.map(lambda x: x, variables)
    for block in silenced["blocks"].values():
        block["code"]["bias"] = block["code"]["bias"].at[2 ** CONFIG.levels[0].n :].set(-1e9)
    got = jax.jit(losses(cut_config))(cut, inputs, targets)
    np.testing.assert_allclose(got, whole_losses(silenced, inputs, targets), atol=1e-5)
    assert float(jnp.abs(got - whole_losses(variables, inputs, targets)).max()) > 1e-3
    assert jax.tree.structure(cut) == jax.tree.structure(variables)


@pytest.mark.slow
@pytest.mark.parametrize(("standardized", "devices"), [(True, 8), (False, 1)])
def test_selections_carry_the_activations_of_the_definition(
    variables, dataset, standardized, devices
):
    config = dataclasses.replace(CONFIG, forward_standardized=standardized)
    inputs, layers = tokens_BT(dataset, 8), (0, 1)
    batch = {"inputs": inputs, "targets": inputs}
    ids, found = make_selections(config, make_mesh(jax.devices()[:devices]), layers)(
        variables, batch
    )
    _, taps = jax.jit(tapped_losses(config))(variables, inputs, inputs, jnp.arange(T))
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(np.sort(ids[i]), np.sort(taps.ids[layer]))
        code = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["blocks"][layer]["code"])
        at = np.asarray(ids[i])
        score = np.einsum(
            "btd,btad->bta", np.asarray(taps.x[layer], np.float64) - code["mean"], atoms(at, 16)
        )
        scale = np.maximum(code["std"][at], 1e-3) if standardized else 1
        np.testing.assert_allclose(
            found[i], np.maximum(score / scale + code["bias"][at], 0), atol=1e-5
        )


def slice_of(dataset, variables, windows, rows, devices=1):
    mesh = make_mesh(jax.devices()[:devices])
    return Slice(dataset.val, Windows(windows * T, T, T), rows, mesh, (0, 1), CONFIG, variables)


@pytest.mark.slow
def test_a_slice_is_read_in_order_whatever_the_batches(variables, dataset):
    def collected(rows, devices):
        seen = {0: [], 1: []}
        reported = []
        piece = slice_of(dataset, variables, 6, rows, devices)
        for layer, *arrays in piece.selections(lambda done, total: reported.append((done, total))):
            seen[layer].append(arrays)
        assert reported == [(min(done, 6), 6) for done in range(rows, 6 + rows, rows)]
        return {
            layer: [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
            for layer, batches in seen.items()
        }

    alone, spread = collected(4, 1), collected(8, 8)
    for layer in (0, 1):
        ids, strengths, tokens, positions = alone[layer]
        np.testing.assert_array_equal(tokens, dataset.val.take(0, 6 * T))
        np.testing.assert_array_equal(positions, np.arange(6 * T))
        assert ids.shape == strengths.shape == (6 * T, 12)
        np.testing.assert_array_equal(ids, spread[layer][0])
        np.testing.assert_allclose(strengths, spread[layer][1], atol=1e-5)
        np.testing.assert_array_equal(tokens, spread[layer][2])
        np.testing.assert_array_equal(positions, spread[layer][3])


@pytest.fixture(scope="module")
def study(variables, dataset):
    piece = slice_of(dataset, variables, 6, 4)
    return study_slice(piece, dataset.tokenizer, features_per_level=6, contexts=3)


def test_the_study_is_about_the_text(study, dataset):
    assert [layer["layer"] for layer in study["layers"]] == [0, 1]
    for layer in study["layers"]:
        for level, (reachable, k) in zip(
            layer["levels"], [(16, 3), (48, 4), (192, 5)], strict=True
        ):
            counts = np.array(level["counts"])
            assert len(counts) == level["reachable"] == reachable
            assert counts.sum() == 6 * T * k
            assert level["fired"] == np.count_nonzero(counts)
            assert level["dead"] == np.mean(counts < 0.1 * counts.mean())
            bins = [
                ((counts >= 2**i // 2) & (counts < 2**i)).sum()
                for i in range(len(level["histogram"]))
            ]
            assert level["histogram"] == bins and sum(bins) == reachable
    by_key = {(f["layer"], f["level"], f["id"]): f for f in study["features"]}
    assert len(by_key) == len(study["features"])
    val = dataset.val.take(0, 7 * T)
    read = text_reader(dataset.tokenizer)
    base = np.bincount(val[: 6 * T], minlength=320) / (6 * T)
    for (layer, level, feature), f in by_key.items():
        cell = study["layers"][layer]["levels"][level]
        assert f["count"] == cell["counts"][feature - [0, 16, 64][level]] > 0
        assert len(f["contexts"]) == min(3, f["count"])
        assert f["contexts"][0]["activation"] == f["max_activation"] >= f["mean_activation"]
        for context in f["contexts"]:
            position = context["position"]
            first = max(position - 16, position // T * T)
            assert context["token_id"] == val[position]
            whole = read(val[first : position + 9])
            assert context["before"] + context["token"] + context["after"] == whole
            assert (
                context["token_id"] in {token["id"] for token in f["tokens"]}
                or len(f["tokens"]) == 12
            )
        for token in f["tokens"]:
            assert token["share"] == pytest.approx(token["count"] / f["count"], rel=1e-3)
            assert token["lift"] == pytest.approx(token["share"] / base[token["id"]], rel=1e-3)
        assert bool(f["parents"]) == (level > 0)
        # every child leads to its likeliest parent, and if that one lists it the numbers agree
        for r in f["parents"][:1]:
            parent = by_key[layer, level - 1, r["id"]]
            assert r["given_child"] == pytest.approx(r["count"] / f["count"], rel=1e-3)
            assert r["given_parent"] == pytest.approx(r["count"] / parent["count"], rel=1e-3)
            listed = [back for back in parent["children"] if back["id"] == feature]
            assert all(back | {"id": r["id"]} == r for back in listed)


def test_tokens_read_as_in_the_middle_of_a_text(dataset):
    tokenizer = dataset.tokenizer
    read = text_reader(tokenizer)
    ids = tokenizer.encode("ab  cd ef")
    assert "".join(read(ids[i : i + 1]) for i in range(len(ids))) == "ab  cd ef"
    assert read(np.array([*ids, tokenizer.bos_id, *ids])) == f"ab  cd ef{BOS_MARK}ab  cd ef"
    assert read(ids[:0]) == ""


def whole(study, **changes):
    """The study as the command writes it."""
    levels = [
        {"n": n, "k": k, "degree": degree, "features": 2**n} for n, k, degree in CONFIG.levels
    ]
    losses = [
        {"levels": i, "active_features": 3 * i, "loss": 4 - i / 10, "bpb": 2 - i / 20}
        for i in (1, 2, 3)
    ]
    about = {
        "run": "runs/tiny",
        "step": 7,
        "weights": "final",
        "data": "data/tiny",
        "tokens": 6 * T,
    }
    return about | {"levels": levels, "losses": losses} | study | changes


def embedded(html):
    return re.search(
        '<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL
    ).group(1)


def test_no_text_can_end_the_data_of_the_page(study):
    hostile = "</script><script>document.title='taken'</script><!-- {{data}} & \u2028 😀"
    first, *others = study["features"]
    first = first | {"tokens": [first["tokens"][0] | {"text": hostile}]}
    value = whole(study, features=[first, *others])
    html = page(value)
    data = json.loads(embedded(html))
    assert "<" not in embedded(html)
    assert data["features"] == value["features"]
    assert data["features"][0]["tokens"][0]["text"] == hostile
    assert html.count("</script>") == page(whole(study)).count("</script>") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)  # only the names of SVG and HTML


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_the_page(study, tmp_path):
    hostile = "</script><b>&amp;"
    first, *others = study["features"]
    value = whole(
        study, features=[first | {"tokens": [first["tokens"][0] | {"text": hostile}]}, *others]
    )
    (tmp_path / "page.html").write_text(page(value))
    with opened(tmp_path / "profile") as browser:

        def drawn(place, size=DESKTOP):
            browser.open("about:blank")
            browser.open(f"file://{tmp_path}/page.html{place}", size)
            assert browser.problems == []
            return browser.ask("document.documentElement.outerHTML")

        overview = drawn("")
        assert "<title>Features of runs/tiny</title>" in overview
        assert overview.count("<svg") == 2 * 3
        assert f"{len(study['features'])} of {len(study['features'])} features" in overview
        place = f"#L{first['layer']}/{first['level']}/{first['id']}"
        feature = drawn(place)
        assert (
            f">Feature {first['id']}</span> of layer {first['layer']}, level {first['level']}"
            in feature
        )
        assert "&lt;/script&gt;&lt;b&gt;&amp;amp;</span>" in feature
        assert feature.count('class="context"') == len(first["contexts"])
        assert "is not among the features studied" in drawn("#L0/0/999999")
        for where in ("", place):
            drawn(where, PHONE)
            assert browser.overflow() <= 0


@pytest.mark.slow
def test_the_command_writes_page_and_json(
    variables, dataset, tiny_recipe, tmp_path, monkeypatch, capsys
):
    config = load(str(tiny_recipe))
    model = TrainedModel(
        dataclasses.replace(config, model=CONFIG), variables, 20, "final", tmp_path
    )
    one_device = make_mesh(jax.devices()[:1])
    monkeypatch.setattr("sngpt_jax.weights.source.load_model", lambda *arguments: model)
    monkeypatch.setattr("sngpt_jax.cluster.mesh.make_mesh", lambda: one_device)
    out = ["--run", str(tmp_path), "--out", str(tmp_path / "deep" / "page.html")]
    assert main([*out, "--tokens", "320", "--layers", "1", "--features", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["step"], found["weights"]) == (320, 20, "final")
    assert [row["active_features"] for row in found["losses"]] == [3, 7, 12]
    stream = dataset.val.take(0, 321).astype(np.int32)
    inputs, targets = (jnp.asarray(tokens.reshape(10, T)) for tokens in (stream[:-1], stream[1:]))
    assert found["losses"][2]["loss"] == pytest.approx(
        float(jnp.mean(whole_losses(variables, inputs, targets))), rel=1e-5
    )
    assert {f["layer"] for f in found["features"]} == {1}
    shown = json.loads(embedded((tmp_path / "deep" / "page.html").read_text()))
    assert shown["features"] == found["features"]

    with pytest.raises(UserError, match="is a folder"):
        main(["--run", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        main(["--run", str(tmp_path), "--out", "/proc/page.html"])
    with pytest.raises(UserError, match="is the page itself"):
        main([*out, "--json", out[-1]])
    with pytest.raises(UserError, match="--features and --contexts must be at least 1"):
        main([*out, "--features", "0"])
    dense = dataclasses.replace(model, config=config)
    monkeypatch.setattr("sngpt_jax.weights.source.load_model", lambda *arguments: dense)
    with pytest.raises(UserError, match="no sparse code"):
        main(out)


def test_layers_are_read_from_text():
    assert parse_layers("all", 3) == (0, 1, 2)
    assert parse_layers("2,0,2", 3) == (0, 2)
    for text in ("", "3", "-1", "0,", "a", "0-2"):
        with pytest.raises(UserError, match="from 0 to 2"):
            parse_layers(text, 3)
