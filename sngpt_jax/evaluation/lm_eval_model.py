"""A model of this project as lm-eval's `LM`, and lm-eval's tasks run on it.

lm-eval is EleutherAI's lm-evaluation-harness, of the extra `eval`; importing this module needs it.
Several processes each run the whole task on the model they share, and come to the same results: to
lm-eval each is alone.
"""

import contextlib
import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api import task as task_module
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.evaluation.likelihood import LanguageModel, Progress

logger = logging.getLogger("sngpt_jax")

MAX_TOKENS = 256  # that a task generates which does not say how many, as with lm-eval's own models


class NotLoaded(UserError):
    """lm-eval knows a task, but cannot load it."""


class SngptLM(LM):
    """`likelihood.LanguageModel` behind lm-eval's interface."""

    def __init__(self, model: LanguageModel, progress: Progress | None = None) -> None:
        super().__init__()
        self.model = model
        self.progress = progress

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(ln p, whether every token is the likeliest) of each request's (context, continuation)."""
        found = self.model.loglikelihood([request.args for request in requests], self.progress)
        return self._keep("loglikelihood", requests, [(one.logprob, one.greedy) for one in found])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p of each request's whole text."""
        found = self.model.rolling([request.args[0] for request in requests], self.progress)
        return self._keep("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that continues each request's (context, options): greedy, or at the temperature
        that the options give.

        Options that say nothing of the length: 256 tokens, or half of data.seq_len where that is
        less. Raises `UserError` for options that would change the text and are not served, such as
        beams.
        """
        texts: list[str] = []
        for options, group in groupby(requests, lambda request: request.args[1]):
            served = self._options(options)
            texts += self.model.generate(
                [request.args[0] for request in group], **served, progress=self.progress
            )
        return self._keep("generate_until", requests, texts)

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `LanguageModel.generate` that lm-eval's options stand for."""
        rest: dict[str, Any] = {
            **normalize_gen_kwargs(options, min(MAX_TOKENS, self.model.seq_len // 2))
        }
        temperature = float(rest.pop("temperature", 1.0 if rest.pop("do_sample") else 0.0))
        served = {
            "until": rest.pop("until"),
            "max_tokens": rest.pop("max_gen_toks"),
            "temperature": temperature,
            "top_k": max(0, rest.pop("top_k", 0) or 0),  # none, 0 and -1 all mean off
        }
        # 1 is the value that changes nothing, of num_beams as of top_p
        unserved = [
            f"{name} = {value}"
            for name, value in rest.items()
            if value != 1 and (temperature or name != "top_p")
        ]
        if unserved:
            raise UserError(
                f"the task generates with {', '.join(unserved)}, which is not served; leave it out"
                " of the task"
            )
        return served

    def _keep(self, kind: str, requests: Sequence[Instance], answers: list[Any]) -> list[Any]:
        """The answers, noted in lm-eval's cache of them where it keeps one."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


# ---------------------------------------------------------------------------------------------- tasks


@functools.cache
def _manager(include: Path | None, own: bool) -> TaskManager:
    """The tasks in the folder `include` and, with `own`, lm-eval's: to list those takes it about
    15 s.
    """
    return TaskManager(include_path=str(include) if include else None, include_defaults=own)


def _manager_of(name: str, include: Path | None) -> TaskManager:
    """One that knows the task, group or tag `name`. Raises `UserError` where there is none."""
    if include and name in (local := _manager(include, False)).all_tasks:
        return local
    manager = _manager(include, True)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise UserError(
            f"--tasks {name}: lm-eval has no task of this name (commas part tasks, so no path can"
            " have one)"
            + (
                f"; did you mean {', '.join(close)}?"
                if close
                else "; `lm-eval ls tasks` lists them"
            )
        )
    return manager


def check(names: Sequence[str], include: Path | None = None) -> None:
    """Raises `UserError` unless lm-eval, or the folder `include` of its task files, knows all
    `names`.
    """
    for name in names:
        _manager_of(name, include)


def run(
    model: LanguageModel,
    name: str,
    *,
    limit: int = 0,
    include: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """lm-eval's results for the task `name`: {metric: number, ..., "samples": number}; a group's
    by task.

    At most `limit` samples of each task (0: all). A metric of another filter than none is named
    "metric,filter"; one that is not finite is None. Raises `NotLoaded` where the task cannot be
    loaded, such as one to be downloaded without a network, and `UserError` where it cannot be run.
    """

    def load() -> tuple[TaskManager, dict[str, Any]]:
        manager = _manager_of(name, include)
        try:
            return manager, manager.load([name])
        except Exception as error:  # whatever a task's own code, its data set or the network gives
            raise NotLoaded(f"lm-eval cannot load its task {name}: {_one_line(error)}") from error

    with _in_silence():
        return _run(model, name, limit, load, progress)


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Keeps lm-eval's and its libraries' bars and remarks from stderr. Ours says how far it is;
    errors are exceptions.
    """
    log, bar, had_none = (
        logging.getLogger("lm_eval"),
        task_module.tqdm,
        datasets.are_progress_bars_disabled(),
    )
    level = log.level
    log.setLevel(logging.ERROR)
    task_module.tqdm = functools.partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        task_module.tqdm = bar
        if not had_none:
            datasets.enable_progress_bars()


def _run(
    model: LanguageModel,
    name: str,
    limit: int,
    load: Callable[[], tuple[TaskManager, dict[str, Any]]],
    progress: Progress | None,
) -> dict[str, Any]:
    manager, loaded = processes.everywhere(load)
    groups: dict[str, Any] = loaded.get("groups") or {}
    tasks = [groups[name]] if name in groups else list(loaded["tasks"].values())
    try:
        found = simple_evaluate(
            SngptLM(model, progress),
            tasks=tasks,
            limit=limit or None,
            task_manager=manager,
            bootstrap_iters=0,  # no standard errors: some are of many thousand draws
            log_samples=False,
        )
    except UserError:
        raise
    # of a task's own code; the others are still to run, so where it was goes to the log
    except Exception as error:
        logger.warning(f"lm-eval's task {name} failed", exc_info=True)
        raise UserError(f"lm-eval cannot run its task {name}: {_one_line(error)}") from error
    # only processes of another rank than 0 are given nothing, and to lm-eval there is one
    assert found
    by_task = {
        task: _numbers(metrics) | {"samples": found["n-samples"][task]["effective"]}
        for task, metrics in found["results"].items()
        if task in found["n-samples"]
    }
    by_group = {group: _numbers(metrics) for group, metrics in found.get("groups", {}).items()}
    return by_task[name] if list(by_task) == [name] else by_task | by_group


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Those of lm-eval's metrics that are numbers; the others are names, and "N/A" for errors that
    are not asked for.

    Its count of samples is left out: `run` gives its own.
    """
    kept = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, Real) and name != "sample_len"
    }
    numbers = {name.removesuffix(",none"): value for name, value in kept.items()}
    return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}
