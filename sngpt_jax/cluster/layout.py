"""Which one of how many processes this is: by a command's options, or by Slurm."""

import os
import re
from dataclasses import dataclass

from jax._src.clusters import (
    SlurmCluster,  # jax's own reading of Slurm's variables, needed before jax.distributed is called
)

from sngpt_jax.base.errors import UserError
from sngpt_jax.config.options import OptionalInt


@dataclass(frozen=True)
class ProcessArguments:
    """Options of a command that several processes may run together."""

    # HOST:PORT at which process 0 will answer the others; default under Slurm: the step's first
    # node
    coordinator: str = ""
    process_id: OptionalInt = None  # this process's number, from 0; default under Slurm: the task's
    num_processes: OptionalInt = None  # how many there are; 1: this one by itself, also under Slurm


@dataclass(frozen=True)
class Layout:
    """One process's place among several."""

    coordinator: str  # HOST:PORT
    index: int
    count: int
    # which of the node's GPUs are its own; None: all that it sees
    local_devices: tuple[int, ...] | None
    source: str  # for the log


def find_layout(arguments: ProcessArguments) -> Layout | None:
    """The layout that the options give, else that of the Slurm job step of several tasks that this
    is one of; None: alone.

    Raises `UserError` for options that do not go together.
    """
    index, count = arguments.process_id, arguments.num_processes
    if count == 1 and not index:
        return None
    if arguments.coordinator or index is not None or count is not None:
        if not arguments.coordinator or index is None or count is None:
            raise UserError(
                "--coordinator, --process-id and --num-processes go together: give all three"
            )
        if not 0 <= index < count:
            raise UserError(
                f"--process-id {index} is not one of --num-processes {count}, which are counted"
                " from 0"
            )
        if not re.fullmatch(r".+:\d{1,5}", arguments.coordinator):
            raise UserError(
                f"--coordinator {arguments.coordinator} is not HOST:PORT, such as node1:12345"
            )
        return Layout(arguments.coordinator, index, count, None, "options")
    if not SlurmCluster.is_env_present():
        return None
    # the step's own number: salloc's shell is a step of one task in which SLURM_NTASKS is the job's
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS") or SlurmCluster.get_process_count())
    if count == 1:
        return None
    return Layout(
        SlurmCluster.get_coordinator_address(None, None),
        SlurmCluster.get_process_id(),
        count,
        _own_devices(),
        "Slurm",
    )


def _own_devices() -> tuple[int, ...] | None:
    """Of a task that is alone on its node, or to which Slurm has bound GPUs, all that it sees;
    else the GPU of its number.
    """
    # such as 1(x2) or 2,1
    tasks = re.sub(r"\(x\d+\)", "", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if set(tasks) == {"1"} or os.environ.get("SLURM_GPUS_PER_TASK") or (bound and "," not in bound):
        return None
    return (int(os.environ["SLURM_LOCALID"]),)
