"""Encodes the parts of a source with datatrove (https://github.com/huggingface/datatrove), on this
machine or in jobs of a Slurm cluster: one task of a pipeline per part.
"""

import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor, launch_slurm_job
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.terminal import Report
from sngpt_jax.data.encode import follow_parent, holding_interrupt
from sngpt_jax.data.parts import Parts, Submitted

_REPORT_SECONDS = 2.0  # between looks at the progress of the parts in work
_MEMORY_GB = 4  # of a job's one processor: a shard and its copies, a Parquet row group


class EncodePart(PipelineStep):
    """A pipeline's only step: task r encodes what is missing of part r."""

    name = "encode part"
    type = "🔢 - TOKENIZER"

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Encodes part `rank` and passes `data` on."""
        self.parts.encode(rank)
        return data


# ---------------------------------------- on this machine


def _start_worker(told: Connection) -> None:
    def exit_when_told() -> None:  # during any work: files appear whole or not at all
        told.poll(None)  # until the parent closes its end
        os._exit(1)

    follow_parent()
    threading.Thread(target=exit_when_told, daemon=True).start()
    logger.disable("datatrove")  # it shows tracebacks; the parent gets the exceptions


def encode_here(parts: Parts, workers: int, report: Report) -> None:
    """Encodes the parts that are left, `workers` at a time, and reports progress.

    The first part that fails stops the others, whose whole shards are kept. datatrove's own pool
    would wait forever for a killed process.
    """
    left = parts.left()
    if not left:
        return
    logs, steps = str(parts.directory / "logs"), [EncodePart(parts)]
    executor = LocalPipelineExecutor(steps, parts.count, logging_dir=logs, skip_completed=False)
    context = multiprocessing.get_context("spawn")
    # Not an Event: its set() waits for every waiter to wake, and forever if one was killed.
    told, tell = context.Pipe(duplex=False)
    tokens: dict[int, int] = {}  # by part
    with ProcessPoolExecutor(min(workers, len(left)), context, _start_worker, (told,)) as pool:
        try:
            with holding_interrupt():
                tasks = {pool.submit(executor._run_for_rank, part): part for part in left}
            pending = set(tasks)
            while pending:
                done, pending = wait(pending, _REPORT_SECONDS, FIRST_COMPLETED)
                for task in done:
                    task.result()
                for task in (*done, *(task for task in pending if task.running())):
                    tokens[tasks[task]] = parts.reached(tasks[task]).tokens
                ended, total = len(left) - len(pending), sum(tokens.values())
                report(0, 0, f"{ended} of {len(left)} parts, {total:,} tokens")
        except BrokenProcessPool:
            killed = "an encoding process was killed, perhaps for memory"
            raise UserError(f"{killed}; resume with fewer --workers") from None
        except BaseException:
            tell.close()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------- on a cluster


class _Array(SlurmPipelineExecutor):
    """A job array with one task per part that is left."""

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: Any = None) -> list[int]:
        return self.pipeline[0].parts.left()

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Leaves partition and time to SBATCH_PARTITION and SBATCH_TIMELIMIT, or to the cluster."""
        arguments = super().get_sbatch_args(max_array)
        return {key: arguments[key] for key in arguments if key not in ("partition", "time")}

    def launch_merge_stats(self) -> None:
        """Does nothing, because the parts' journals hold the counts."""


def submit(parts: Parts, workers: int, merge: Sequence[str]) -> Submitted:
    """Submits a job array that encodes the parts that are left, `workers` at a time, and a job that
    then runs the command `merge`, in this folder with this interpreter. Raises `UserError` if
    sbatch is missing or refuses.
    """
    logger.disable("datatrove")  # its log of the launch
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
    left, array_job = len(parts.left()), ""
    try:
        array.launch_job()
        array_job = "" if array.job_id == -1 else str(array.job_id)
        log = logs / "slurm_logs" / "merge_%j.out"
        arguments = array.get_sbatch_args() | {"job-name": "merge", "output": log, "error": log}
        arguments.pop("array", None)
        if array_job:  # where a task fails, the merge leaves the queue
            arguments |= {"dependency": f"afterok:{array_job}", "kill-on-invalid-dep": "yes"}
        script = array.get_launch_file_contents(arguments, shlex.join(merge))
        return Submitted(left, array_job, launch_slurm_job(script, array.job_id_retriever))
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        problem = "no sbatch here; run it on a machine of the cluster"
    except subprocess.CalledProcessError as error:
        problem = f"sbatch failed with status {error.returncode}; see its message above"
        if array_job:
            problem += f"; job {array_job} is in the queue: scancel {array_job} and run this again"
    raise UserError(f"--executor slurm: {problem}")
