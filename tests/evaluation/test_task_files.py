"""Published files as lm-eval's tasks: prompts and metrics against answers worked out by hand, and
files that are not as published.
"""

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.likelihood import Continuation
from sngpt_jax.evaluation.task_files import answer_words, load, words_f1
from sngpt_jax.evaluation.tasks import run_tasks

ACTIVITY = {  # a row of the published file's form, from ActivityNet
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        "naps.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing.",
    ],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}
WIKIHOW = {
    **ACTIVITY,
    "activity_label": "Personal Care and Style",
    "ctx_a": "[header] How to grow a beard [title] Wait. [step] Be patient,  and",
    "ctx_b": "",
    "label": "1",
    "endings": ["[substeps] é é é", "do  not shave.", "shave", "shave it."],
}
CONTEXTS = [
    "Roof shingle removal: A man is sitting on a roof. He",
    "Personal Care and Style: How to grow a beard. Wait. Be patient, and",
]


class Model:
    """Gives the answers that a test chooses, and notes the requests."""

    seq_len = 64

    def __init__(self, found=(), texts=()):
        self.found, self.texts, self.asked = list(found), list(texts), []

    def loglikelihood(self, pairs, progress=None):
        self.asked += pairs
        return self.found[: len(pairs)]

    def generate(self, prompts, until, max_tokens, temperature, top_k, progress=None):
        assert temperature == 0
        self.asked.append((prompts, until, max_tokens))
        return self.texts[: len(prompts)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(model, name, path):
    return run_tasks(model, {name: path})[name]


def error_of(name, path):
    return only(Model(), name, path)["error"]


def answers(*given):
    """A model whose answers have these (ln p, number of tokens)."""
    return Model([Continuation(logprob, False, tokens) for logprob, tokens in given])


# ---------------------------------------------------------------------------------------- HellaSwag


def shares(acc, acc_norm, acc_bytes, acc_token_norm, samples=1):
    found = {"acc": acc, "acc_norm": acc_norm, "acc_bytes": acc_bytes}
    return found | {"acc_token_norm": acc_token_norm, "samples": samples}


def test_hellaswag(tmp_path):
    """Two samples on which the four metrics differ."""
    path = write(tmp_path / "hellaswag_val.jsonl", ACTIVITY, WIKIHOW)
    model = answers(
        (-10.0, 5),  # -2.0 per character, -2.0 per token
        (-12.0, 6),  # "is ripping level tiles off." 27 characters: -0.44, -2.0
        (-13.0, 26),  # "is holding a rubik's cube." 26: -0.5, -0.5
        (-9.0, 3),  # right: 26 characters: -0.35, -3.0
        # "é é é" with a space before: 6 characters -1.0, 9 bytes -0.67, -6 per token
        (-6.0, 1),
        # right: "do not shave." 13: -0.75, -0.75 per byte, -0.75 per token
        (-9.75, 13),
        (-9.5, 5),
        (-9.8, 5),
    )
    assert only(model, "hellaswag", path) == shares(0.5, 1.0, 0.5, 0.5, samples=2)
    endings = [
        [f" {e}" for e in ACTIVITY["endings"]],
        ["  é é é", " do not shave.", " shave", " shave it."],
    ]
    assert model.asked == [
        (context, e) for context, four in zip(CONTEXTS, endings, strict=True) for e in four
    ]


def test_of_equal_endings_the_first_counts(tmp_path):
    row = {**ACTIVITY, "endings": ["ab", "cd", "ef", "gh"], "label": 0}
    got = only(answers(*[(-1.0, 1)] * 4), "hellaswag", write(tmp_path / "h.jsonl", row))
    assert got == shares(1.0, 1.0, 1.0, 1.0)


def test_acc_norm_is_by_the_characters_of_the_ending_alone(tmp_path):
    """With the space before it counted too the first would win: -0.5 against -0.6."""
    path = write(tmp_path / "h.jsonl", {**ACTIVITY, "endings": ["a", "bcd"], "label": 1})
    got = only(answers((-1.0, 1), (-2.4, 2)), "hellaswag", path)
    assert got == shares(0.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a b", "text": "c d"}', "the key 'text' is given twice"),
        ('{"text": "a b", "x": NaN}', "'NaN' is no finite number"),
        ('{"text": "a \\ud800 b"}', "holds half of a surrogate pair"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(tmp_path, line, said):
    path = tmp_path / "l.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=f"l.jsonl, line 1: .*{said}"):
        load("lambada", path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endings": None}, "endings is of type NoneType, expected list"),
        ({"endings": ["a", 3]}, "endings[1] is of type int, expected str"),
        ({"endings": ["a", "[x] [y]"]}, "one of endings is empty"),
        ({"ctx_a": None}, "ctx_a is of type NoneType, expected str"),
        ({"label": 4}, "label is 4, expected 0 to 3"),
        ({"label": True}, "label is True, expected 0 to 3"),
        ({"label": "9" * 5000}, "label is '999999999999...9999999999999', expected 0 to 3"),
        ({"label": -1}, "label is -1, expected 0 to 3"),
    ],
)
def test_a_line_that_is_not_as_published_is_named(tmp_path, changes, message):
    path = write(tmp_path / "h.jsonl", ACTIVITY, {**ACTIVITY, **changes})
    expected = f"{path}, line 2: {message}; give HellaSwag's hellaswag_val.jsonl"
    assert only(Model(), "hellaswag", path) == {"error": expected}


@pytest.mark.parametrize(
    ("row", "message"), [("[1]", "the line is of type list"), ("{}", "activity_label is missing")]
)
def test_a_line_of_another_kind_is_named(tmp_path, row, message):
    (path := tmp_path / "h.jsonl").write_text(row)
    assert f"{path}, line 1: {message}" in error_of("hellaswag", path)


# ------------------------------------------------------------------------------------------ LAMBADA


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".JSONL"])
def test_lambada(tmp_path, suffix, start):
    said = "\u201cno\u2028way ,\u201d said "
    texts = ["he looked at his dog", f"{said} Vivienne", "give me the\x0bkey"]
    path = tmp_path / f"lambada{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(texts) + "\n")
    else:
        write(path, *({"text": text} for text in texts))
    path.write_text(start + path.read_text())
    model = Model(
        [Continuation(-1.0, True, 2), Continuation(-3.0, False, 1), Continuation(-0.5, True, 1)]
    )
    got = only(model, "lambada", path)
    assert got == {"acc": 2 / 3, "perplexity": pytest.approx(math.exp(1.5)), "samples": 3}
    assert model.asked == [
        ("he looked at his", " dog"),
        (said, " Vivienne"),
        ("give me", " the\x0bkey"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"one two\n\nthree four\n", "l.txt, line 2: empty"),
        ("l.txt", b"", "l.txt, line 1: empty"),
        ("l.txt", b"one two\nword\n", "l.txt, line 2: expected a passage of several words"),
        ("l.txt", b"one two\nthr\xe9e four\n", "l.txt, line 2: 'utf-8' codec can't decode"),
        (
            "l.json",
            b'{ "text": "one two"}',
            "l.json, line 1: a JSON object where a passage is expected; name the file .jsonl",
        ),
        ("l.txt", b'{one} two\n{"text": "one two"}', "l.txt, line 2: a JSON object"),
        ("l.jsonl", b'{"text": "one two"}\n{"text": 3}', "l.jsonl, line 2: text is of type int"),
        ("l.jsonl", b'{"text": "one two"}\n{"text": "tw', "l.jsonl, line 2: Unterminated string"),
        (
            "l.jsonl",
            b'{"text": "one two"}\n' + b"[" * 100_000,
            "l.jsonl, line 2: more than 64 levels deep",
        ),
    ],
)
def test_a_passage_that_is_not_as_published_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in error_of("lambada", tmp_path / name)


# -------------------------------------------------------------------------------------------- SQuAD


def squad(*questions):
    """The published form, with one article of one paragraph."""
    rows = [
        {
            "id": str(i),
            "question": question,
            "answers": [{"text": text, "answer_start": 0} for text in texts],
            **more,
        }
        for i, (question, texts, more) in enumerate(questions)
    ]
    paragraphs = [{"context": "It was.", "qas": rows}]
    return {"version": "1.1", "data": [{"title": "Super_Bowl_50", "paragraphs": paragraphs}]}


def test_squad(tmp_path):
    content = squad(("Who?", ["Denver Broncos", "the Broncos"], {}), ("When?", ["1998"], {}))
    model = Model(texts=[" The broncos!", " in 1998, I think"])
    got = only(model, "squad", write(tmp_path / "dev-v1.1.json", content))
    f1 = pytest.approx(100 * (1 + 2 * 1 / (4 + 1)) / 2)
    assert got == {"exact_match": 50.0, "f1": f1, "samples": 2}
    prompt = "Title: Super_Bowl_50\n\nBackground: It was.\n\nQuestion: Who?\n\nAnswer:"
    assert model.asked == [([prompt, prompt.replace("Who", "When")], ["\n"], 32)]


def test_squad_2_wants_nothing_where_the_text_does_not_say(tmp_path):
    no = {"is_impossible": True, "plausible_answers": [{"text": "him", "answer_start": 0}]}
    questions = [("Who?", ["Eve"], {"is_impossible": False}), ("Whom?", [], no), ("Whose?", [], no)]
    path = write(tmp_path / "dev-v2.0.json", squad(*questions))
    got = only(Model(texts=["Eve", "him", " ."]), "squad", path)
    share = pytest.approx(100 * 2 / 3)
    has = {"has_ans_exact_match": 100.0, "has_ans_f1": 100.0, "has_ans_samples": 1}
    assert got == {"exact_match": share, "f1": share, "samples": 3, **has}


def test_a_right_answer_without_words_is_left_out(tmp_path):
    """Where it is the only one, an answer without words is right."""
    path = write(tmp_path / "s.json", squad(("Who?", ["The", "Eve"], {}), ("What?", ["!"], {})))
    got = only(Model(texts=["the", "a"]), "squad", path)
    assert got == {"exact_match": 50.0, "f1": 50.0, "samples": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": []}, "s.json: holds no questions"),
        ({"rows": []}, "s.json: data is missing"),
        (
            {"data": [{"title": "a", "paragraphs": [{"qas": []}]}]},
            "data[0].paragraphs[0].context is missing",
        ),
        (squad(("Who?", [3], {})), "data[0].paragraphs[0].qas[0].answers[0].text is of type int"),
        (
            squad(("Who?", ["a"], {}), ("Who?", [], {})),
            "data[0].paragraphs[0].qas[1].is_impossible contradicts 0 answers",
        ),
        (squad(("Who?", ["a"], {"is_impossible": True})), "is_impossible contradicts 1 answers"),
    ],
)
def test_a_question_that_is_not_as_published_is_named(tmp_path, content, message):
    assert message in error_of("squad", write(tmp_path / "s.json", content))


@pytest.mark.parametrize(
    ("text", "words"),
    [("The  Cat,\tan' the Hat!", ["cat", "hat"]), ("$1,000.50-b theatre", ["100050b", "theatre"])],
)
def test_answers_are_normalized_as_published(text, words):
    assert answer_words(text) == words


words = st.lists(st.sampled_from(["cat", "sat", "on"]), max_size=6)


@given(words, words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(got, want):
    if not got or not want:
        assert words_f1(got, want) == (not got and not want)
        return
    same = sum(min(n, Counter(want)[word]) for word, n in Counter(got).items())
    precision, recall = same / len(got), same / len(want)
    f1 = 2 * precision * recall / (precision + recall) if same else 0.0
    assert words_f1(got, want) == pytest.approx(f1)
