"""Downstream tasks, run by lm-eval: three of them over published files, the others as lm-eval
defines them.

A task that cannot be run gives {"error": "one line"}. The other tasks still run.
"""

import contextlib
import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api import task as task_module
from lm_eval.tasks import TaskManager

from sngpt_jax.base import errors
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import at_home
from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.cluster import processes
from sngpt_jax.evaluation import task_files
from sngpt_jax.evaluation.likelihood import LanguageModel
from sngpt_jax.evaluation.lm_eval_model import SngptLM
from sngpt_jax.evaluation.task_files import FILE_TASKS
from sngpt_jax.evaluation.windows import OnProgress

logger = logging.getLogger("sngpt_jax")


def parse_tasks(text: str, include: Path | None = None) -> dict[str, Path | None]:
    """`hellaswag=PATH,lambada=PATH,piqa` as a file per task, None for tasks of lm-eval or of the
    folder `include`. Raises `UserError` for an unknown task or a needless `include`.
    """
    if include and not include.is_dir():
        wanted = "give a folder with lm-eval's task files (*.yaml)"
        raise UserError(f"--task-definitions {include}: not a folder; {wanted}")
    spec: dict[str, Path | None] = {}
    known = ", ".join(FILE_TASKS)
    for part in text.split(","):
        name, given, path = (piece.strip() for piece in part.partition("="))
        if not name or (given and not path):
            raise UserError(
                f"--tasks {text}: expected NAME=PATH with a name of {known}, or names of lm-eval's"
                " tasks, separated by commas"
            )
        if given and name not in FILE_TASKS:
            raise UserError(
                f"--tasks {part}: only {known} read a file; give lm-eval's tasks without =PATH, and"
                " no path with a comma"
            )
        if name in spec:
            raise UserError(f"--tasks {text}: {name} is named twice; name it once")
        if name == "squad" and not given and not include:
            raise UserError(
                "--tasks squad: lm-eval has no task of this name; give the published file,"
                " squad=PATH"
            )
        spec[name] = Path(at_home(path)) if given else None
    foreign = [name for name, path in spec.items() if path is None]
    if include and not foreign:
        needless = f"--tasks {text} names no task of lm-eval; remove the option"
        raise UserError(f"--task-definitions {include}: {needless}")
    for name in foreign:
        _manager_of(name, include)
    return spec


@functools.cache
def _manager(include: Path | None, own: bool) -> TaskManager:
    # to list lm-eval's own tasks takes about 15 s
    return TaskManager(include_path=str(include) if include else None, include_defaults=own)


def _manager_of(name: str, include: Path | None) -> TaskManager:
    """A manager that knows the task, group or tag `name`."""
    if include and name in (local := _manager(include, False)).all_tasks:
        return local
    manager = _manager(include, True)
    if name not in manager.all_tasks:
        close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=3))
        remedy = f"did you mean {close}?" if close else "`lm-eval ls tasks` lists them"
        raise UserError(
            f"--tasks {name}: lm-eval has no task of this name (commas separate tasks, so no path"
            f" can contain a comma); {remedy}"
        )
    return manager


def run_tasks(
    model: LanguageModel,
    spec: Mapping[str, Path | None],
    *,
    limit: int = 0,
    include: Path | None = None,
    progress: Callable[[str], OnProgress] | None = None,
) -> dict[str, dict[str, Any]]:
    """The results of each task in `spec`, over its first `limit` samples (0: all)."""
    results: dict[str, dict[str, Any]] = {}
    for name, path in spec.items():
        lm = SngptLM(model, progress(name) if progress else None)
        try:
            with _in_silence():
                results[name] = _run(lm, name, path, limit, include)
        except UserError as error:
            results[name] = {"error": _one_line(error)}
    return results


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Keeps the progress bars and remarks of lm-eval and its libraries from stderr."""
    log, bar = logging.getLogger("lm_eval"), task_module.tqdm
    level, had_none = log.level, datasets.are_progress_bars_disabled()
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
    lm: SngptLM, name: str, path: Path | None, limit: int, include: Path | None
) -> dict[str, Any]:
    """lm-eval's results for one task: {metric: number, …, "samples": number}; a group's by task."""
    if path:
        digest = processes.everywhere(functools.partial(file_sha256, path, UserError))
        processes.check_alike({f"task {name}": digest})

    def load() -> tuple[TaskManager, list[Any]]:
        try:
            if path:
                return _manager(None, False), [task_files.load(name, path)]
            manager = _manager_of(name, include)
            loaded = manager.load([name])
        except UserError:
            raise
        except Exception as error:  # whatever a task's own code, its data set or the network raises
            hint = f"; or give the published file: {name}=PATH" if name in FILE_TASKS else ""
            raise UserError(
                f"lm-eval cannot load its task {name}: {_one_line(error)}{hint}"
            ) from error
        groups = loaded.get("groups") or {}
        return manager, [groups[name]] if name in groups else list(loaded["tasks"].values())

    manager, tasks = processes.everywhere(load)
    try:
        found = simple_evaluate(
            lm,
            tasks=tasks,
            limit=limit or None,
            task_manager=manager,
            bootstrap_iters=0,  # no standard errors: some take many thousand draws
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:  # of a task's own code; the log says where, since other tasks follow
        logger.warning(f"lm-eval's task {name} failed", exc_info=True)
        raise UserError(f"lm-eval cannot run its task {name}: {_one_line(error)}") from error
    assert found  # lm-eval sees one process
    samples = found["n-samples"]
    by_task = {
        task: _numbers(metrics) | {"samples": samples[task]["effective"]}
        for task, metrics in found["results"].items()
        if task in samples
    }
    by_group = {group: _numbers(metrics) for group, metrics in found.get("groups", {}).items()}
    return by_task[name] if list(by_task) == [name] else by_task | by_group


def _one_line(error: Exception) -> str:
    return errors.one_line(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


def _numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The metrics that are numbers, None where not finite; a filter's as "metric,filter"."""
    found: dict[str, float | None] = {}
    for name, value in metrics.items():
        if isinstance(value, Real) and name != "sample_len":
            number = value if isinstance(value, int) else float(value)
            found[name.removesuffix(",none")] = number if math.isfinite(number) else None
    return found
