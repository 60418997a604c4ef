"""lm-eval's tasks: tiny ones from local files against the model's own answers, names of tasks, and
tasks that cannot be run.
"""

import json
import math
import textwrap
import zlib

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation import tasks
from sngpt_jax.evaluation.likelihood import Continuation
from sngpt_jax.evaluation.tasks import parse_tasks, run_tasks

ROLLING = """
    output_type: loglikelihood_rolling
    doc_to_text: ""
    doc_to_target: "{{question}}"
    metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
    """
GENERATE = """
    output_type: generate_until
    doc_to_text: "{{question}}"
    doc_to_target: "{{choices[answer]}}"
    generation_kwargs: {until: ["s"], OPTIONS}
    metric_list: [{metric: exact_match}]
    """
CHOICE = """
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_target: "{{answer}}"
    doc_to_choice: "{{choices}}"
    metric_list: [{metric: acc}, {metric: acc_norm}]
    """
GROUP = "group: tiny_group\ntask: [tiny_choice, tiny_rolling]\n"
HELLASWAG = """
    output_type: multiple_choice
    process_docs: !function words.process_docs
    doc_to_text: "{{query}}"
    doc_to_target: "{{label}}"
    doc_to_choice: "choices"
    metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
    """  # lm_eval/tasks/hellaswag/hellaswag.yaml
LAMBADA = """
    output_type: loglikelihood
    doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
    doc_to_target: "{{' '+text.split(' ')[-1]}}"
    metric_list: [{metric: perplexity}, {metric: acc}]
    """  # lm_eval/tasks/lambada/lambada_standard.yaml

DOCS = [
    {"question": "the cat", "choices": ["sat on the mat", "log"], "answer": 0},
    {"question": "the dog", "choices": ["mat", "sat on the log"], "answer": 1},
    {"question": "on the", "choices": ["log", "dog"], "answer": 0},
]


def write_task(folder, name, body, rows):
    data = folder / f"{name}.jsonl"
    if rows is not None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"""\
        task: {name}
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / "cache"}}}
        test_split: test
        """
    (folder / f"{name}.yaml").write_text(textwrap.dedent(head) + textwrap.dedent(body).lstrip())


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """A folder of lm-eval task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    greedy, beams = "max_gen_toks: 5, do_sample: false", "num_beams: 4"
    write_task(folder, "tiny_choice", CHOICE, DOCS)
    write_task(folder, "tiny_rolling", ROLLING, DOCS)
    write_task(folder, "tiny_generate", GENERATE.replace("OPTIONS", greedy), DOCS)
    write_task(folder, "tiny_beams", GENERATE.replace("OPTIONS", beams), DOCS)
    write_task(folder, "tiny_absent", ROLLING, None)
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


class Invented:
    """Answers that follow from the words alone, and the requests for texts."""

    seq_len = 16

    def __init__(self):
        self.asked = []

    def loglikelihood(self, pairs, progress=None):
        found = [zlib.crc32(f"{context}|{text}".encode()) for context, text in pairs]
        return [Continuation(-(n % 997) / 50, n % 3 == 0, 1 + n % 5) for n in found]

    def generate(self, prompts, **options):
        self.asked.append((prompts, options))
        return ["log"] * len(prompts)


def run(name, include, model=None, **options):
    return run_tasks(model or Invented(), {name: None}, include=include, **options)[name]


def test_rolling(include):
    got = run("tiny_rolling", include, limit=2)
    found = Invented().loglikelihood([("", doc["question"]) for doc in DOCS[:2]])
    total = sum(one.logprob for one in found)
    bits, perplexity = -total / math.log(2) / 14, math.exp(-total / 4)
    expected = {"bits_per_byte": bits, "word_perplexity": perplexity, "samples": 2}
    assert got == pytest.approx(expected)
    assert all(type(value) in (float, int) for value in got.values())


def test_generate_until(include):
    model = Invented()
    got = run("tiny_generate", include, model)
    assert got == {"exact_match": pytest.approx(1 / 3), "samples": 3}
    options = {"until": ["s"], "max_tokens": 5, "temperature": 0.0, "top_k": 0, "progress": None}
    assert model.asked == [([doc["question"] for doc in DOCS], options)]


def test_one_that_fails_leaves_the_others(include):
    spec = parse_tasks("tiny_absent,tiny_beams,tiny_rolling", include)
    got = run_tasks(Invented(), spec, include=include)
    absent = got["tiny_absent"]["error"]
    assert "cannot load its task tiny_absent" in absent and "\n" not in absent
    assert "num_beams = 4" in got["tiny_beams"]["error"]
    assert got["tiny_rolling"]["samples"] == 3


def test_a_group_is_given_by_task(include):
    by_task = {name: run(name, include) for name in ("tiny_choice", "tiny_rolling")}
    assert run("tiny_group", include) == by_task


def test_an_unknown_task_is_one_line(include, monkeypatch):
    local = tasks._manager(include, False)
    # to list lm-eval's own takes it 15 s
    monkeypatch.setattr(tasks, "_manager", lambda include, own: local)
    wanted = (
        r"--tasks tiny_choise: lm-eval has no task of this name \(commas separate.*\); did you"
        r" mean tiny_choice"
    )
    with pytest.raises(UserError, match=wanted):
        parse_tasks("lambada=a folder,tiny_choise", include)
    assert parse_tasks("tiny_group", include) == {"tiny_group": None}


@pytest.mark.parametrize("name", ["hellaswag", "lambada"])
def test_one_that_cannot_be_loaded_but_is_here_too_names_its_file(tmp_path, name):
    write_task(tmp_path, name, ROLLING, None)
    got = run_tasks(Invented(), parse_tasks(name, tmp_path), include=tmp_path)[name]["error"]
    assert "cannot load" in got and got.endswith(f"; or give the published file: {name}=PATH")


def test_hellaswag_and_lambada_equal_lm_evals_own(tmp_path):
    """Its own wording and metrics of the same files, but for where the data comes from."""
    (tmp_path / "words.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    cases = [
        ("A man sits.", "he", "", ""),
        ("[header] Roofs [title] Tiles", "", "[step] ", "é"),
        ("It is  odd [x] so", "and", "", ""),
    ]
    endings = ("ab ", "cde", "f  g", "hijk l")
    choices = [
        {
            "activity_label": f"Task {i}",
            "ctx_a": a,
            "ctx_b": b,
            "endings": [f"{mark}{ending * (i + 1)}{tail}." for ending in endings],
            "label": i % 4,
        }
        for i in range(4)
        for a, b, mark, tail in cases
    ]
    passage = "\u201che looked , at  number {}\u201d he said {}him"
    passages = [{"text": passage.format("i" * i, "to" * i)} for i in range(12)]
    write_task(tmp_path, "our_hellaswag", HELLASWAG, choices)
    write_task(tmp_path, "our_lambada", LAMBADA, passages)
    for name in ("hellaswag", "lambada"):
        theirs = run(f"our_{name}", tmp_path)
        ours = run_tasks(Invented(), {name: tmp_path / f"our_{name}.jsonl"})[name]
        ours.pop("acc_token_norm", None)
        assert ours == pytest.approx({metric: theirs[metric] for metric in ours})
        assert 0 < ours["acc"] < 1


def test_a_file_that_is_missing_leaves_the_others(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("one two\nthree four\nfive six\n")

    class Model(Invented):
        def loglikelihood(self, pairs, progress=None):
            progress(len(pairs), len(pairs))
            return [Continuation(-1.0, True, 1)] * 2

    seen = []

    def progress(name):
        return lambda *counts: seen.append((name, *counts))

    spec = {"squad": tmp_path / "none.json", "lambada": path, "hellaswag": path}
    got = run_tasks(Model(), spec, limit=2, progress=progress)
    missing = f"{tmp_path}/none.json: cannot be read: No such file or directory"
    assert got["squad"] == {"error": missing}
    assert got["lambada"] == {"acc": 1.0, "perplexity": pytest.approx(math.e), "samples": 2}
    assert "l.txt, line 1: Expecting value" in got["hellaswag"]["error"]
    assert list(got) == ["squad", "lambada", "hellaswag"]
    assert seen == [("lambada", 2, 2)]


def test_what_the_model_refuses_is_an_error_of_the_task(tmp_path):
    class Refusing(Invented):
        def loglikelihood(self, *_):
            raise UserError("no\nroom")

    (tmp_path / "l.txt").write_text("one two\n")
    got = run_tasks(Refusing(), {"lambada": tmp_path / "l.txt"})
    assert got == {"lambada": {"error": "no room"}}


def test_parse_tasks():
    assert list(parse_tasks("lambada=a/b.txt, hellaswag=c=d.jsonl").items()) == [
        ("lambada", tasks.Path("a/b.txt")),
        ("hellaswag", tasks.Path("c=d.jsonl")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME=PATH with a name of hellaswag, lambada, squad"),
        ("lambada=x,", "expected NAME=PATH"),
        ("lambada=", "expected NAME=PATH"),
        ("lambda=x", "only hellaswag, lambada, squad read a file.*no path with a comma"),
        ("squad", "lm-eval has no task of this name; give the published file, squad=PATH"),
        ("lambada=x,lambada=y", "lambada is named twice"),
    ],
)
def test_other_tasks_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_tasks(text)
    assert "--tasks" in str(raised.value) and "\n" not in str(raised.value)


def test_definitions_that_no_task_needs_or_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--tasks lambada=x names no task of lm-eval; remove"):
        parse_tasks("lambada=x", tmp_path)
    with pytest.raises(UserError, match="none: not a folder; give a folder"):
        parse_tasks("piqa", tmp_path / "none")
