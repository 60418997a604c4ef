"""Which one of how many processes this is, by a command's options or by Slurm's variables."""

import os
import re
from dataclasses import dataclass

from sngpt_jax.base.errors import UserError
from sngpt_jax.config.options import OptionalInt


@dataclass(frozen=True)
class ProcessArguments:
    """The options that make a command one of several processes."""

    # HOST:PORT of process 0, where all processes meet; default under Slurm: the step's first node
    coordinator: str = ""
    # this process's number, from 0; default under Slurm: the task's number
    process_id: OptionalInt = None
    # number of processes; 1 makes this process alone, also under Slurm
    num_processes: OptionalInt = None


@dataclass(frozen=True)
class Layout:
    """One process's place among several."""

    coordinator: str  # HOST:PORT
    index: int
    count: int
    local_devices: tuple[int, ...] | None  # its own GPUs of the node; None: all that it sees
    source: str  # for the log


def find_layout(arguments: ProcessArguments) -> Layout | None:
    """The layout by the options, else by a Slurm step of several tasks; None: alone.

    Raises `UserError` for options that do not go together.
    """
    index, count = arguments.process_id, arguments.num_processes
    if count == 1 and not index:
        return None
    if arguments.coordinator or index is not None or count is not None:
        if not arguments.coordinator or index is None or count is None:
            raise UserError("give all three of --coordinator, --process-id and --num-processes")
        if not 0 <= index < count:
            raise UserError(f"--process-id {index} is not one of 0 … {count - 1}")
        coordinator = arguments.coordinator
        given = re.fullmatch(r".+:(\d{1,5})", coordinator)
        if not given or int(given[1]) >= 2**16:
            raise UserError(f"--coordinator {coordinator} is not HOST:PORT, such as node1:12345")
        return Layout(coordinator, index, count, None, "options")
    job, nodes = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_NODELIST")
    if not job or not nodes:
        return None
    # SLURM_NTASKS is the job's: the shell of salloc is a step of one task
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"])
    if count == 1:
        return None
    name = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # the first of n[003-007,009],m1
    assert name
    port = 2**16 - 2**12 + int(job) % 2**12  # one per job of a node
    address = f"{name[1]}{name[2] or ''}:{port}"
    return Layout(address, int(os.environ["SLURM_PROCID"]), count, _own_devices(), "Slurm")


def _own_devices() -> tuple[int, ...] | None:
    """None, all visible GPUs, for a task that is alone on its node or has GPUs bound by Slurm;
    else the GPU with the task's number on the node.
    """
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 1(x2) or 2,1
    tasks = re.sub(r"\(x\d+\)", "", per_node).split(",")
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if set(tasks) == {"1"} or os.environ.get("SLURM_GPUS_PER_TASK") or (bound and "," not in bound):
        return None
    return (int(os.environ["SLURM_LOCALID"]),)
