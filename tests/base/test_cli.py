"""How a command ends: Ctrl-C at any moment, a full disk, a file that is too large, threads that
are still at work.
"""

import subprocess
import sys

import pytest

from tests.tiny_run import ROOT

# Modules of a command, in a package that is imported first as `kernels` and `sngpt_jax` are.
PACKAGE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
from kernels import commands
commands.expect_interrupts()
"""
IMPORTS = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
"""
CALLBACK = """
import gc, os, signal
from kernels import commands

def interrupted(phase, info):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the exception is raised here, and goes nowhere
        pass

def main(argv):
    gc.callbacks.append(interrupted)
    gc.collect()
    return 0

commands.run(main)
"""
MAIN = """
import os, signal
from kernels import commands

def main(argv):
    os.kill(os.getpid(), signal.SIGINT)
    return 0

commands.run(main)
"""
PRINTS = """
from kernels import commands

def main(argv):
    print("x" * 100_000)
    return 0

commands.run(main)
"""
WRITES = """
import errno
from kernels import commands

def main(argv):
    raise OSError(errno.{name}, "No room", "/a/file")

commands.run(main)
"""
AT_ONCE = """
import threading, time
from kernels import commands

def main(argv):
    threading.Thread(target=time.sleep, args=(600,)).start()  # a process waits for its threads
    print("so far")
    error = UserError("the save has failed")
    error.at_once = True
    raise error

commands.run(main)
"""


def run(folder, module, **options):
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text(PACKAGE)
    (folder / "package" / "command.py").write_text(module)
    settings = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, "-m", "package.command"],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.mark.parametrize("module", [IMPORTS, CALLBACK, MAIN], ids=["imports", "callback", "main"])
def test_ctrl_c_is_one_word_at_any_moment(tmp_path, module):
    done = run(tmp_path, module)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_output_onto_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = run(tmp_path, PRINTS, stdout=full)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: stdout, or a file, cannot be written: No space left on device; free space and"
        " start again\n"
    )


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_file_that_no_room_is_left_for_is_named(tmp_path, name):
    done = run(tmp_path, WRITES.format(name=name))
    assert done.returncode == 2
    assert done.stderr == "error: /a/file cannot be written: No room; free space and start again\n"


def test_other_failures_of_the_system_are_bugs(tmp_path):
    done = run(tmp_path, WRITES.format(name="EPERM"))
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_error_that_ends_at_once_waits_for_no_thread(tmp_path):
    done = run(tmp_path, AT_ONCE, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "so far\n",
        "error: the save has failed\n",
    )
