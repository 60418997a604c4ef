"""Which one of how many processes a command is, by its options and by Slurm's environment."""

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.layout import Layout, ProcessArguments, find_layout

# what srun gives the second task of `srun --nodes 2 --ntasks-per-node 1`
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


@pytest.fixture
def slurm(monkeypatch):
    """Sets Slurm's variables, and no others of it."""

    def set_to(variables):
        for name in {*STEP, "SLURM_STEP_NUM_TASKS", "SLURM_GPUS_PER_TASK", "CUDA_VISIBLE_DEVICES"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_to({})
    return set_to


def test_options_say_who_is_who(slurm):
    slurm(STEP)
    given = find_layout(ProcessArguments("node1:1234", 2, 3))
    assert given == Layout("node1:1234", 2, 3, None, "options")
    assert find_layout(ProcessArguments(num_processes=1)) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ProcessArguments(coordinator="node1:1234"), "give all three"),
        (ProcessArguments(process_id=0), "give all three"),
        (ProcessArguments("node1:1234", num_processes=2), "give all three"),
        (ProcessArguments("node1:1234", 2, 2), "--process-id 2 is not one of 0 … 1"),
        (ProcessArguments("node1:1234", -1, 2), "--process-id -1"),
        (ProcessArguments("node1:1234", 1, 1), "--process-id 1"),
        (ProcessArguments("node1", 0, 2), "not HOST:PORT"),
        (ProcessArguments("node1:http", 0, 2), "not HOST:PORT"),
        (ProcessArguments("node1:65536", 0, 2), "not HOST:PORT"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(slurm, arguments, said):
    with pytest.raises(UserError, match=said):
        find_layout(arguments)


def test_a_step_of_several_tasks_is_found(slurm):
    slurm(STEP)
    layout = find_layout(ProcessArguments())
    port = layout.coordinator.rpartition(":")[2]
    assert layout == Layout(f"gpu007:{port}", 1, 2, None, "Slurm")
    assert 1024 < int(port) < 65536
    for nodes, first in (("gpu[007,9]", "gpu007"), ("a-1,b2", "a-1"), ("n[12-13],m", "n12")):
        slurm({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": nodes})
        assert find_layout(ProcessArguments()).coordinator == f"{first}:{port}"


@pytest.mark.parametrize(
    "left",
    [
        {},
        {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks 1
        # the shell of salloc, a step of a job of two tasks
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # a batch script itself, outside of srun
        {name: value for name, value in STEP.items() if "STEP" not in name},
    ],
)
def test_without_a_step_of_several_tasks_a_process_is_alone(slurm, left):
    slurm(left)
    assert find_layout(ProcessArguments()) is None


@pytest.mark.parametrize(
    ("tasks", "visible", "per_task", "devices"),
    [
        ("1(x2)", "0,1,2,3", "", None),  # one task per node has all of its GPUs
        ("1", "", "", None),
        ("8(x2)", "0,1,2,3,4,5,6,7", "", (3,)),  # one task per GPU
        ("8(x2)", "", "", (3,)),
        ("4,2", "", "", (3,)),
        ("8(x2)", "5", "", None),  # Slurm has bound it
        ("4(x2)", "2,3", "2", None),
    ],
)
def test_the_gpus_of_a_task(slurm, tasks, visible, per_task, devices):
    gpus = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_PER_TASK": per_task}
    slurm({**STEP, "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": tasks, **gpus})
    assert find_layout(ProcessArguments()).local_devices == devices
