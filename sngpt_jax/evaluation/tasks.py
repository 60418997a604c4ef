"""Downstream tasks: HellaSwag, LAMBADA and SQuAD from files as they are published, zero-shot;
others through lm-eval.

A task that cannot be run gives {"error": "one line"} in the place of its results, and the others
still run.
"""

import codecs
import functools
import hashlib
import json
import math
import re
import reprlib
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.data.tokenizer import replace_surrogates
from sngpt_jax.evaluation.likelihood import LanguageModel, Progress

Metrics = dict[str, Any]

LM_EVAL = "lm-eval>=0.4.12"  # the first whose tasks are loaded as here
# the most that an answer is generated of; the published ones have about 4 words
SQUAD_ANSWER_TOKENS = 32


# ---------------------------------------------------------------------------------------------- files


def _lines(path: Path, published: str) -> Iterator[tuple[str, str]]:
    """Each line of a text file with where it stands. Raises `UserError` where there is none, or
    one is empty or not UTF-8.
    """
    lines = _read(path).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8; give {published}") from None
        if not text:
            raise UserError(f"{where}: empty; give {published}")
        yield where, text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _json(text: str | bytes, where: str, published: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}; give {published}") from None


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _field(holder: Any, name: str, kind: type, where: str, published: str) -> Any:
    """What a JSON object keeps under `name`, which must be of type `kind`."""
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        found = (
            f"of type {type(value).__name__}"
            if isinstance(holder, dict) and name in holder
            else "missing"
        )
        raise UserError(f"{where}: {name!r} is {found}, expected {kind.__name__}; give {published}")
    return value


# ---------------------------------------------------------------------------------------------- HellaSwag


@dataclass(frozen=True)
class Choice:
    """A context and its possible endings, of which the one at index `label` is right."""

    context: str
    endings: tuple[str, ...]
    label: int


def _clean(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow, as lm-eval's task cleans it, and as UTF-8 can
    encode it.
    """
    text = re.sub(r"\[.*?\]", "", replace_surrogates(text).strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read_hellaswag(path: Path) -> list[Choice]:
    """The samples of `hellaswag_val.jsonl` (rowanz/hellaswag), their text as lm-eval's task words
    it.

    Raises `UserError` that names the line where the file is damaged.
    """
    published = "HellaSwag's hellaswag_val.jsonl"
    samples: list[Choice] = []
    for where, line in _lines(path, published):
        row = _json(line, where, published)
        activity, first, second = (
            _field(row, name, str, where, published)
            for name in ("activity_label", "ctx_a", "ctx_b")
        )
        given = _field(row, "endings", list, where, published)
        endings = tuple(_clean(ending) if isinstance(ending, str) else "" for ending in given)
        label = row.get("label")  # an integer in the published file, its digits in copies of it
        indices = [str(i) for i in range(len(endings))]
        if not isinstance(label, int | str) or str(label) not in indices:
            raise UserError(
                f"{where}: 'label' is {reprlib.repr(label)}, expected 0 to {len(endings) - 1}; give"
                f" {published}"
            )
        if not all(ending.strip() for ending in endings):
            raise UserError(f"{where}: one of 'endings' is not text, or empty; give {published}")
        samples.append(
            Choice(_clean(f"{activity}: {first} {second.capitalize()}"), endings, int(label))
        )
    return samples


def score_hellaswag(
    model: LanguageModel, samples: Sequence[Choice], progress: Progress | None = None
) -> Metrics:
    """Shares of samples whose right ending has the largest of these: `acc` ln p; `acc_norm` ln p a
    character; `acc_bytes` a UTF-8 byte; `acc_token_norm` a token.

    The first three are lm-eval's metrics of these names, and `acc_norm` is the one that is
    published for HellaSwag; per token is GPT-3's (Brown et al. 2020, arXiv:2005.14165, section
    2.4). Of equal endings the first counts.
    """
    pairs = [(sample.context, f" {ending}") for sample in samples for ending in sample.endings]
    found = iter(model.loglikelihood(pairs, progress))
    right: Counter[str] = Counter()
    for sample in samples:
        ends = [next(found) for _ in sample.endings]
        lengths = {
            "acc": [1] * len(ends),
            "acc_norm": [len(ending) for ending in sample.endings],
            "acc_bytes": [len(ending.encode()) for ending in sample.endings],
            # no tokens: ln p is 0, whatever divides it
            "acc_token_norm": [max(end.tokens, 1) for end in ends],
        }
        for metric, length in lengths.items():
            best = np.argmax([end.logprob / units for end, units in zip(ends, length, strict=True)])
            right[metric] += int(best == sample.label)
    names = ("acc", "acc_norm", "acc_bytes", "acc_token_norm")
    return {metric: right[metric] / len(samples) for metric in names} | {"samples": len(samples)}


# ---------------------------------------------------------------------------------------------- LAMBADA


@dataclass(frozen=True)
class Passage:
    """A passage but for its last word, and that word."""

    context: str
    word: str


def read_lambada(path: Path) -> list[Passage]:
    """The passages of `lambada_test_plain_text.txt`, one a line, or of a `.jsonl` with {"text":
    ...} a line, as OpenAI's.

    Raises `UserError` that names the line where the file is damaged, or holds JSON under another
    name.
    """
    published = "LAMBADA's lambada_test_plain_text.txt, or a .jsonl with the key text"
    samples: list[Passage] = []
    for where, line in _lines(path, published):
        text = line
        if path.suffix.lower() == ".jsonl":
            text = _field(_json(line, where, published), "text", str, where, published).rstrip()
        elif _is_object(line):
            raise UserError(
                f"{where}: a JSON object where a passage is expected; name the file .jsonl"
            )
        context, _, word = text.rpartition(" ")
        if not context:
            raise UserError(f"{where}: expected a passage of several words; give {published}")
        samples.append(Passage(context, word))
    return samples


def score_lambada(
    model: LanguageModel, samples: Sequence[Passage], progress: Progress | None = None
) -> Metrics:
    """`acc`: the share of passages each token of whose last word is the likeliest; `perplexity` of
    the last word.

    As lm-eval's lambada tasks, where words are what spaces part (Paperno et al. 2016,
    arXiv:1606.06031).
    """
    found = model.loglikelihood(
        [(sample.context, f" {sample.word}") for sample in samples], progress
    )
    mean = math.fsum(word.logprob for word in found) / len(found)
    return {
        "acc": sum(word.greedy for word in found) / len(found),
        "perplexity": math.exp(min(-mean, 700.0)),  # where float64 ends
        "samples": len(found),
    }


# ---------------------------------------------------------------------------------------------- SQuAD


@dataclass(frozen=True)
class Question:
    """A prompt, and the answers that are right; none: the text does not say."""

    prompt: str
    answers: tuple[str, ...]


def read_squad(path: Path) -> list[Question]:
    """The questions of SQuAD's dev-v1.1.json or dev-v2.0.json, prompted as lm-eval's squadv2 does.

    Raises `UserError` that names the place where the file is damaged.
    """
    published = "SQuAD's dev-v1.1.json or dev-v2.0.json"
    samples: list[Question] = []
    whole = _json(_read(path), str(path), published)
    for a, article in enumerate(_field(whole, "data", list, str(path), published)):
        where = f"{path}: data[{a}]"
        title = _field(article, "title", str, where, published)
        for p, paragraph in enumerate(_field(article, "paragraphs", list, where, published)):
            there = f"{where}.paragraphs[{p}]"
            context = _field(paragraph, "context", str, there, published)
            for q, qa in enumerate(_field(paragraph, "qas", list, there, published)):
                at = f"{there}.qas[{q}]"
                question, rows = (
                    _field(qa, "question", str, at, published),
                    _field(qa, "answers", list, at, published),
                )
                answers = tuple(
                    _field(row, "text", str, f"{at}.answers[{i}]", published)
                    for i, row in enumerate(rows)
                )
                if bool(answers) == bool(qa.get("is_impossible", False)):
                    raise UserError(
                        f"{at}: 'is_impossible' contradicts {len(answers)} answers; give"
                        f" {published}"
                    )
                prompt = (
                    f"Title: {title}\n\nBackground: {context}\n\nQuestion: {question}\n\nAnswer:"
                )
                samples.append(Question(prompt, answers))
    if not samples:
        raise UserError(f"{path}: holds no questions; give {published}")
    return samples


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus space, as SQuAD's evaluation script
    compares answers.
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(answer: str, right: str) -> float:
    """The F1 of an answer's normalized words against a right one's; where either has none, whether
    both do.
    """
    got, want = normalize_answer(answer).split(), normalize_answer(right).split()
    if not got or not want:
        return float(got == want)
    same = sum((Counter(got) & Counter(want)).values())
    return 2 * same / (len(got) + len(want))  # = 2 P R / (P + R) of P = same / got, R = same / want


def score_squad(
    model: LanguageModel, samples: Sequence[Question], progress: Progress | None = None
) -> Metrics:
    """`exact_match` and `f1` in percent, as SQuAD's evaluation script: the best over a question's
    right answers, averaged.

    Answers are generated greedily up to the end of the line. The rules are those of version 2's
    script. Version 1.1's differs where an answer has no words once normalized: it compares such a
    right answer as it does others, where version 2's leaves it out; and it gives two empty ones an
    F1 of 0, version 2's of 1. A question without an answer wants an empty one; where there are
    such, `has_ans_exact_match` and `has_ans_f1` are over the others. Source: Rajpurkar et al.
    2016, arXiv:1606.05250, and 2018, arXiv:1806.03822.
    """
    answers = model.generate(
        [sample.prompt for sample in samples], ["\n"], SQUAD_ANSWER_TOKENS, progress=progress
    )
    scores = []
    for sample, answer in zip(samples, answers, strict=True):
        # an answer that is nothing but articles and punctuation cannot be told from none
        rights = [right for right in sample.answers if normalize_answer(right)] or [""]
        exact = max(normalize_answer(answer) == normalize_answer(right) for right in rights)
        scores.append((float(exact), max(answer_f1(answer, right) for right in rights)))
    exact_match, f1 = 100 * np.mean(scores, axis=0)
    metrics: Metrics = {"exact_match": float(exact_match), "f1": float(f1), "samples": len(samples)}
    answerable = [score for sample, score in zip(samples, scores, strict=True) if sample.answers]
    if answerable and len(answerable) < len(samples):
        exact_match, f1 = 100 * np.mean(answerable, axis=0)
        metrics |= {
            "has_ans_exact_match": float(exact_match),
            "has_ans_f1": float(f1),
            "has_ans_samples": len(answerable),
        }
    return metrics


# ---------------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Task:
    """A task that is read from a file."""

    read: Callable[[Path], list[Any]]
    score: Callable[[LanguageModel, Sequence[Any], Progress | None], Metrics]
    in_lm_eval: bool  # which has a task of this name too


TASKS = {
    "hellaswag": Task(read_hellaswag, score_hellaswag, in_lm_eval=True),
    "lambada": Task(read_lambada, score_lambada, in_lm_eval=True),
    "squad": Task(read_squad, score_squad, in_lm_eval=False),
}


def _lm_eval() -> ModuleType | None:
    """The module that runs lm-eval's tasks; None where lm-eval is not installed, or is too old."""
    try:
        from sngpt_jax.evaluation import lm_eval_model
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        return None
    return lm_eval_model


def _run_lm_eval(
    model: LanguageModel, name: str, limit: int, include: Path | None, progress: Progress | None
) -> Metrics:
    instead = f"; or give the published file: {name}=PATH" if name in TASKS else ""

    def installed() -> ModuleType:
        if not (lm_eval := _lm_eval()):
            install = cli.command("pip", "install", LM_EVAL)
            raise UserError(
                f"the task {name} needs the package {LM_EVAL}; install it: {install}{instead}"
            )
        return lm_eval

    lm_eval = processes.everywhere(installed)
    try:
        return lm_eval.run(model, name, limit=limit, include=include, progress=progress)
    except lm_eval.NotLoaded as error:
        raise UserError(f"{error}{instead}") from error


def parse_tasks(text: str, include: Path | None = None) -> dict[str, Path | None]:
    """`hellaswag=PATH,lambada=PATH,piqa` as a file for each task, None for those of lm-eval's.

    `include` is a folder of lm-eval task files beside its own. Raises `UserError` for a task that
    nobody knows, and for an `include` that is no folder or that no task needs; where lm-eval is
    not installed its tasks are left for `run_tasks` to report.
    """
    if include and not include.is_dir():
        raise UserError(
            f"--task-definitions {include}: not a folder; give one with lm-eval's task files"
            " (*.yaml)"
        )
    spec: dict[str, Path | None] = {}
    for part in text.split(","):
        name, given, path = (piece.strip() for piece in part.partition("="))
        known = ", ".join(TASKS)
        if not name or (given and not path):
            raise UserError(
                f"--tasks {text}: expected NAME=PATH of {known}, or names of lm-eval's tasks,"
                " parted by commas"
            )
        if given and name not in TASKS:
            raise UserError(
                f"--tasks {part}: of the tasks that read a file there are {known}; one of lm-eval's"
                " takes no =PATH, and commas part tasks"
            )
        if not given and not include and name in TASKS and not TASKS[name].in_lm_eval:
            raise UserError(
                f"--tasks {name}: lm-eval has no task of this name; give the published file,"
                f" {name}=PATH"
            )
        if name in spec:
            raise UserError(f"--tasks {text}: {name} is named twice; name it once")
        spec[name] = Path(path) if given else None
    foreign = [name for name, path in spec.items() if path is None]
    if include and not foreign:
        raise UserError(
            f"--task-definitions {include}: no task of --tasks {text} is lm-eval's; leave it out"
        )
    if foreign and (lm_eval := _lm_eval()):
        lm_eval.check(foreign, include)
    return spec


def run_tasks(
    model: LanguageModel,
    spec: Mapping[str, Path | None],
    *,
    limit: int = 0,
    include: Path | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Metrics]:
    """The results of each task in `spec` by name, over its first `limit` samples (0: all).

    A task whose file is missing or damaged, whose package is not installed, or that the model
    cannot take, gives {"error": "one line"}, in all processes if in one. `progress` makes a task's
    name into what is told of (done, total).
    """
    results: dict[str, Metrics] = {}
    for name, path in spec.items():
        report = progress(name) if progress else None
        try:
            if path:
                samples = processes.everywhere(functools.partial(TASKS[name].read, path))
                processes.check_alike(
                    {f"task {name}": hashlib.sha256(repr(samples).encode()).hexdigest()}
                )
                results[name] = TASKS[name].score(
                    model, samples[:limit] if limit else samples, report
                )
            else:
                results[name] = _run_lm_eval(model, name, limit, include, report)
        except UserError as error:
            results[name] = {"error": " ".join(str(error).split())}
    return results
