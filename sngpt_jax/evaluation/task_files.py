"""HellaSwag, LAMBADA and SQuAD as tasks of lm-eval over their published files, without a network.

The prompts and metrics follow lm-eval's tasks `hellaswag`, `lambada_standard` and `squadv2`.
"""

import codecs
import re
import reprlib
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.hellaswag.utils import preprocess

from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.lm_eval_model import Answer

MOST_BYTES = 2**28  # of a file; the largest published one has 48 MB

Row = dict[str, Any]


def _lines(path: Path, row_of: Callable[[str], Row], published: str) -> list[Row]:
    """`row_of` of each line; a `UserError` names the line of its ValueError."""
    rows = []
    content = untrusted.read_bytes(path, MOST_BYTES, UserError)
    lines = content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if not (text := line.decode("utf-8").strip()):
                raise ValueError("empty")
            rows.append(row_of(text))
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{path}, line {number}: {problem}; give {published}") from None
    return rows


def _check(value: Any, form: Any, where: str = "") -> None:
    """Raises ValueError that names the place, unless `value` has the `form`: a type, a list with
    the form of its items, or a dict with the forms of the keys it must have.
    """
    kind, found = form if isinstance(form, type) else type(form), type(value)
    if found is not kind:
        expected = f"of type {found.__name__}, expected {kind.__name__}"
        raise ValueError(f"{where or 'the line'} is {expected}")
    if isinstance(form, list):
        for i, item in enumerate(value):
            _check(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        for name, inner in form.items():
            place = f"{where}.{name}".removeprefix(".")
            if name not in value:
                raise ValueError(f"{place} is missing")
            _check(value[name], inner, place)


def _hellaswag_row(line: str) -> Row:
    row = typed_json.loads(line.encode())
    _check(row, {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": [str]})
    choices = [preprocess(ending) for ending in row["endings"]]
    if not all(choice.strip() for choice in choices):
        raise ValueError("one of endings is empty")
    label = row.get("label")  # an integer in the published file, a string of digits in copies
    if not isinstance(label, int | str) or str(label) not in map(str, range(len(choices))):
        raise ValueError(f"label is {reprlib.repr(label)}, expected 0 to {len(choices) - 1}")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": preprocess(context), "choices": choices, "label": int(label)}


class _HellaSwag(ConfigurableTask):
    """Adds `acc_token_norm`: whether the right ending has the largest ln p per token (Brown et al.
    2020, arXiv:2005.14165, section 2.4).
    """

    def process_results(self, doc: Row, results: list[Answer]) -> dict[str, float]:
        # an ending without tokens has ln p = 0
        per_token = [answer[0] / max(answer.tokens, 1) for answer in results]
        right = float(np.argmax(per_token) == doc["label"])
        return {**super().process_results(doc, results), "acc_token_norm": right}


def _read_lambada(path: Path) -> list[Row]:
    is_json = path.suffix.lower() == ".jsonl"

    def row_of(line: str) -> Row:
        if is_json:
            row = typed_json.loads(line.encode())
            _check(row, {"text": str})
            line = row["text"].rstrip()
        elif re.match(r'\{\s*"', line):
            raise ValueError("a JSON object where a passage is expected; name the file .jsonl")
        context, space, word = line.rpartition(" ")
        if not context:
            raise ValueError("expected a passage of several words")
        return {"context": context, "word": space + word}

    published = "LAMBADA's lambada_test_plain_text.txt, or a .jsonl with the key text"
    return _lines(path, row_of, published)


_QUESTION = {"question": str, "answers": [{"text": str}]}
_SQUAD = {"data": [{"title": str, "paragraphs": [{"context": str, "qas": [_QUESTION]}]}]}


def _squad_rows(whole: Any) -> Iterator[Row]:
    for a, article in enumerate(whole["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, qa in enumerate(paragraph["qas"]):
                answers = [answer["text"] for answer in qa["answers"]]
                if bool(answers) == bool(qa.get("is_impossible", False)):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}].is_impossible"
                    raise ValueError(f"{place} contradicts {len(answers)} answers")
                background = f"Title: {article['title']}\n\nBackground: {paragraph['context']}"
                prompt = f"{background}\n\nQuestion: {qa['question']}\n\nAnswer:"
                # only version 2 has questions without an answer
                yield {"prompt": prompt, "answers": answers, "version_2": "is_impossible" in qa}


def _read_squad(path: Path) -> list[Row]:
    try:
        whole = typed_json.loads(untrusted.read_bytes(path, MOST_BYTES, UserError))
        _check(whole, _SQUAD)
        if not (rows := list(_squad_rows(whole))):
            raise ValueError("holds no questions")
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: {problem}; give SQuAD's dev-v1.1.json or dev-v2.0.json") from None
    return rows


def answer_words(text: str) -> list[str]:
    """The lower-case words that SQuAD's evaluation script compares."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def words_f1(got: list[str], want: list[str]) -> float:
    """The harmonic mean of precision and recall of the words `got`."""
    if not got or not want:
        return float(got == want)
    return 2 * (Counter(got) & Counter(want)).total() / (len(got) + len(want))


def _squad_metrics(doc: Row, results: list[str]) -> dict[str, float]:
    """`exact_match` and `f1` in percent: the best over a question's right answers.

    As in the script for version 2, right answers without words are ignored, and a question without
    an answer wants an empty one. `has_ans_*` are over the other questions of a version 2 file
    (Rajpurkar et al. 2016, arXiv:1606.05250, and 2018, arXiv:1806.03822).
    """
    got = answer_words(results[0])
    rights = [words for right in doc["answers"] if (words := answer_words(right))] or [[]]
    f1 = max(words_f1(got, right) for right in rights)
    metrics = {"exact_match": 100.0 * (got in rights), "f1": 100.0 * f1}
    if doc["version_2"] and doc["answers"]:
        metrics |= {f"has_ans_{name}": value for name, value in metrics.items()}
        metrics["has_ans_samples"] = 1
    return metrics


_Task = tuple[Callable[[Path], list[Row]], type[ConfigurableTask], dict[str, Any], dict[str, Any]]

# reader of the file, kind of task, metrics with their aggregation, other settings
FILE_TASKS: dict[str, _Task] = {
    "hellaswag": (
        lambda path: _lines(path, _hellaswag_row, "HellaSwag's hellaswag_val.jsonl"),
        _HellaSwag,
        dict.fromkeys(("acc", "acc_norm", "acc_bytes"), "mean"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
        },
    ),
    "lambada": (
        _read_lambada,
        ConfigurableTask,
        {"acc": "mean", "perplexity": "perplexity"},
        {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "word"},
    ),
    "squad": (
        _read_squad,
        ConfigurableTask,
        {"exact_match": "mean", "f1": "mean", "has_ans_samples": sum},
        {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "",  # compared by `_squad_metrics`
            # published answers have about 4 words
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32},
            "process_results": _squad_metrics,
        },
    ),
}


def load(name: str, path: Path) -> ConfigurableTask:
    """The task `name` of `FILE_TASKS` over the file `path`. A `UserError` names what is wrong."""
    read, kind, metrics, settings = FILE_TASKS[name]
    rows = read(path)
    listed = [
        {"metric": metric, "aggregation": by, "higher_is_better": metric != "perplexity"}
        for metric, by in metrics.items()
    ]
    settings = {"task": name, "metric_list": listed, "test_split": "test", **settings}
    return kind(config={**settings, "custom_dataset": lambda: {"test": Dataset.from_list(rows)}})
