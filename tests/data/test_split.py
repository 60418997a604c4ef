"""Which documents are held out, against the rule computed again from its words."""

from hashlib import blake2b

import pytest

from sngpt_jax.data import split as module
from sngpt_jax.data.split import Split, choose, place_of_cut
from tests.data.conftest import refuses


@pytest.fixture
def source(monkeypatch):
    """A function that makes `texts` the documents of every source."""
    return lambda texts: monkeypatch.setattr(module, "documents", lambda _, **reading: iter(texts))


def drawn(seed, number):
    digest = blake2b(f"{seed} {number}".encode(), digest_size=6).digest()
    return sum(byte * 256**place for place, byte in enumerate(digest)) / 2**48


def halves(rule):
    return [list(rule.texts(name)) for name in ("train", "val")]


@pytest.mark.parametrize("size", [2, 3, 10, 400])
@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
def test_a_fraction_holds_out_the_lowest_draws_and_leaves_both_splits_a_document(
    source, size, fraction
):
    texts = [f"text {n}" for n in range(size)]
    source(texts)
    for seed in range(5):
        draws = [drawn(seed, n) for n in range(size)]
        below = min(max(sum(x < fraction for x in draws), 1), size - 1)
        expected = sorted(sorted(range(size), key=draws.__getitem__)[:below])
        rule = choose("x", "", 0, fraction, seed)
        train, val = halves(rule)
        assert val == [(n, texts[n]) for n in expected]
        assert sorted(train + val) == list(enumerate(texts))
        for name, found in (("train", train), ("val", val)):
            assert [rule.number(name, place) for place in range(len(found))] == [
                n for n, _ in found
            ]
            assert list(rule.texts(name, found[-1][0])) == found[-1:]


def test_about_the_fraction_is_held_out():
    rule = Split("x", below=0.1, seed=3)
    held_out = sum(rule.takes("val", n) for n in range(20_000))
    assert abs(held_out - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def test_the_first_documents_are_held_out_and_no_more_are_read(source):
    def texts():
        yield from "abc"
        pytest.fail("read on")

    source("abcdef")
    rule = choose("x", "", 2, 0.0, 0)
    assert halves(rule) == [list(enumerate("abcdef"))[2:], [(0, "a"), (1, "b")]]
    assert [rule.number("train", 3), rule.number("val", 1)] == [5, 1]
    source(texts())
    assert list(rule.texts("val")) == [(0, "a"), (1, "b")]
    for given, message in (
        (6, "--source x holds 6 documents and --val-docs 6 leaves none to train on"),
        (9, "--source x holds 6 documents and --val-docs 9 leaves none to train on"),
    ):
        source("abcdef")
        refuses(message, choose, "x", "", given, 0.0, 0)


def test_one_document_is_cut_after_a_line_near_the_share(source):
    lines = [f"line {n}\r\n" for n in range(500)]
    text = "".join(lines)
    source([text])
    rule = choose("x", "", 0, 0.1, 0)
    ((_, train),), ((_, val),) = halves(rule)
    assert train + val == text and train.endswith("\r\n")
    assert 0 <= round(0.9 * len(text)) - len(train) < len("line 499\r\n")
    assert rule.number("val", 0) == rule.number("train", 0) == 0
    assert list(rule.texts("val", 1)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("é" * 1000, 900),
        ("\n" + "🙂" * 999, 900),
        ("ab", 1),
        ("abc", 2),
        ("a" * 895 + "\n" * 99, 895),
    ],
)
def test_without_a_line_near_the_share_the_cut_is_exact(text, expected):
    place = place_of_cut(text, 0.1)
    assert place == expected
    assert 1 <= place_of_cut(text, 1e-9) < len(text) and 1 <= place_of_cut(text, 1 - 1e-9)


def test_what_cannot_be_divided_is_refused(source):
    source([])
    refuses("--source x holds no documents", choose, "x", "", 0, 0.1, 0)
    refuses("--source x holds no documents", choose, "x", "", 3, 0.0, 0)
    refuses("--val-source y holds no documents", choose, "x", "y", 0, 0.0, 0)
    source(["a"])
    refuses("give more text", choose, "x", "", 0, 0.1, 0)
