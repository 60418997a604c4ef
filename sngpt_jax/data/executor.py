"""Encodes the parts of a source with datatrove (https://github.com/huggingface/datatrove): here, or in jobs of a Slurm cluster.

One task of a datatrove pipeline encodes one part (`sngpt_jax.data.parts`). Needs the extra `datatrove`.
"""

import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor, launch_slurm_job
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from sngpt_jax.cli import UserError
from sngpt_jax.data.encode import follow_parent
from sngpt_jax.data.parts import Parts, Submitted

_MEMORY_GB = 4  # of a job's one processor: a shard and its copies, a Parquet row group


class EncodePart(PipelineStep):
    """A pipeline's one step: task r of `parts.count` encodes part r, or what is missing of it."""

    name = "encode part"
    type = "🔢 - TOKENIZER"

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Passes `data` on as it is: the text is read from the source."""
        if world_size != self.parts.count:
            raise ValueError(f"{self.parts.count} parts need as many tasks, not {world_size}")
        self.parts.encode(rank)
        return data


# ---------------------------------------------------------------------------------------------- on this machine


def _start_worker(stop: Event) -> None:
    def exit_when_told() -> None:  # whatever is in work: files appear whole or not at all
        stop.wait()
        os._exit(1)

    follow_parent()
    threading.Thread(target=exit_when_told, daemon=True).start()
    logger.disable("datatrove")  # it shows errors with their tracebacks; the parent gets them as exceptions


def encode_here(parts: Parts, workers: int, report: Callable[[str, int, int], None]) -> None:
    """Encodes the parts that are left, `workers` at a time; calls `report` (what, documents, tokens) after each.

    Raises `UserError` at the first that fails, and stops the others then; their whole shards are kept. The pool is not
    datatrove's own, which waits for ever for a process that was killed.
    """
    left = parts.left()
    if not left:
        return
    logs = str(parts.directory / "logs")
    executor = LocalPipelineExecutor([EncodePart(parts)], tasks=parts.count, logging_dir=logs, skip_completed=False)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    documents = tokens = 0
    with ProcessPoolExecutor(min(workers, len(left)), context, _start_worker, (stop,)) as pool:
        try:
            tasks = {pool.submit(executor._run_for_rank, part): part for part in left}
            for count, task in enumerate(as_completed(tasks), start=1):
                task.result()
                reached = parts.reached(tasks[task])
                documents, tokens = documents + reached.documents, tokens + sum(entry.tokens for entry in reached.shards)
                report(f"{count} of {len(left)} parts", documents, tokens)
        except BrokenProcessPool:
            raise UserError(
                "an encoding process was killed, perhaps for memory; run it again with fewer --workers to go on"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------- on a cluster


class _Array(SlurmPipelineExecutor):
    """A job array, a task for each part that is left."""

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: Any = None) -> list[int]:
        return self.pipeline[0].parts.left()

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Leaves partition and time to SBATCH_PARTITION and SBATCH_TIMELIMIT or the cluster's defaults, as sbatch does."""
        return {key: value for key, value in super().get_sbatch_args(max_array).items() if key not in ("partition", "time")}

    def launch_merge_stats(self) -> None:
        """Nothing: the parts' journals hold what was counted."""


def submit(parts: Parts, workers: int, merge: Sequence[str]) -> Submitted:
    """Submits a job array that encodes the parts that are left, `workers` at a time, and after it the command `merge`.

    The jobs run in this folder with this interpreter, so that both, the source and the output must be on a file system that
    the nodes share. They log into `.slurm` beside the parts. Raises `UserError` where sbatch is missing or refuses.
    """
    logger.disable("datatrove")  # its own account of the launch
    logs = parts.directory.parent.absolute() / ".slurm"
    array = _Array(
        [EncodePart(parts)],
        tasks=parts.count,
        workers=workers,
        time="",
        partition="",
        qos="",
        mem_per_cpu_gb=_MEMORY_GB,
        job_name="encode",
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        logging_dir=str(logs),
        skip_completed=False,
    )
    left = len(parts.left())
    try:
        array.launch_job()
        array_job = "" if array.job_id == -1 else str(array.job_id)
        arguments = {key: value for key, value in array.get_sbatch_args().items() if key != "array"} | {"job-name": "merge"}
        arguments |= dict.fromkeys(("output", "error"), logs / "slurm_logs" / "merge_%j.out")
        if array_job:  # where a task fails, the merge leaves the queue
            arguments |= {"dependency": f"afterok:{array_job}", "kill-on-invalid-dep": "yes"}
        script = array.get_launch_file_contents(arguments, shlex.join(merge))
        return Submitted(left, array_job, launch_slurm_job(script, array.job_id_retriever))
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        raise UserError("--executor slurm: no sbatch here; run it on a machine that submits to the cluster") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"--executor slurm: sbatch failed with status {error.returncode}; see its message above") from None
