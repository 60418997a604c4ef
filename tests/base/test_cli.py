"""How a command ends: Ctrl-C at any moment, a full disk, threads that are still at work."""

import errno
import os
import subprocess
import sys

import pytest

from sngpt_jax.base.errors import FULL, UserError, one_line
from sngpt_jax.base.files import at_home, write_text_atomic
from tests.tiny_run import ROOT

# Modules of a command, in a package that is imported first as `sngpt_jax` is.
PACKAGE = """
from sngpt_jax.base.interrupts import expect_interrupts
expect_interrupts()
"""
IMPORTS = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
"""
CALLBACK = """
import gc, os, signal
from sngpt_jax.base import cli

def interrupted(phase, info):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the exception is raised here, and goes nowhere
        pass

def main(argv):
    gc.callbacks.append(interrupted)
    gc.collect()
    return 0

cli.run(main)
"""
MAIN = """
import os, signal
from sngpt_jax.base import cli

cli.run(lambda argv: os.kill(os.getpid(), signal.SIGINT) or 0)
"""
PRINTS = """
from sngpt_jax.base import cli

cli.run(lambda argv: print("x" * 100_000) or 0)
"""
AT_ONCE = """
import threading, time
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError

def main(argv):
    threading.Thread(target=time.sleep, args=(600,)).start()  # a process waits for its threads
    print("so far")
    error = UserError("the save has failed")
    error.at_once = True
    raise error

cli.run(main)
"""


def run(folder, module, *arguments, env=None, **options):
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text(PACKAGE)
    (folder / "package" / "command.py").write_text(module)
    command = [sys.executable, "-m", "package.command", *arguments]
    env = {**(env or {}), "PYTHONPATH": f"{folder}:{ROOT}"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, cwd=folder, env=env, text=True, **settings)


@pytest.mark.parametrize("module", [IMPORTS, CALLBACK, MAIN], ids=["imports", "callback", "main"])
def test_ctrl_c_is_one_word_at_any_moment(tmp_path, module):
    done = run(tmp_path, module)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_output_onto_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = run(tmp_path, PRINTS, stdout=full)
    said = (
        "stdout, or a file, cannot be written: No space left on device; free space and start again"
    )
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")


def test_a_file_on_a_full_disk_is_named(tmp_path, monkeypatch):
    """The system's error of a write names no file."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_text_atomic(tmp_path / "a", "text")
    expected = f"{tmp_path}/a cannot be written: No room; free space and start again"
    assert one_line(caught.value) == expected and not list(tmp_path.iterdir())


NO_ROOM = "/a cannot be written: No room; free space and start again"
FILES = "raise the limit of open files with ulimit -n"
GONE = "the working folder is gone; change into a folder that exists"
CHECK = "check the path and its permissions"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a\nb"), "a b"),
        *((OSError(number, "No room", "/a"), NO_ROOM) for number in FULL),
        (FileNotFoundError(errno.ENOENT, "Missing", "/a"), f"/a: Missing; {CHECK}"),
        (PermissionError(errno.EACCES, "Denied", "/a"), f"/a: Denied; {CHECK}"),
        (OSError(errno.EIO, "Broken"), f"a file: Broken; {CHECK}"),
        (OSError(errno.EMFILE, "Too many", "/a"), f"Too many; {FILES}"),
        (FileNotFoundError(errno.ENOENT, "Gone"), GONE),
        (FileNotFoundError("a library's own words"), None),
        (MemoryError(), "out of memory; choose smaller sizes or a machine with more memory"),
        (RuntimeError("INTERNAL: no memory"), None),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "text is not utf-8: bad at byte 0"),
        (OSError(errno.EPERM, "no file is named"), None),
        (ValueError("a bug"), None),
    ],
    ids=str,
)
def test_errors_of_the_system_are_one_line_and_bugs_are_none(error, line):
    assert one_line(error) == line


ARGUMENTS = """
import os
from sngpt_jax.base import cli

names = ("JAX_ENABLE_X64", "JAX_TRANSFER_GUARD", "JAX_PLATFORMS")
cli.run(lambda argv: print(argv, *(name in os.environ for name in names)) or 0)
"""


def test_no_home_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="~/a: there is no home folder; set HOME, or give the"):
        at_home("~/a")
    with pytest.raises(UserError, match="~nobody-here/a: there is no user nobody-here with a home"):
        at_home("~nobody-here/a")


def test_variables_that_change_jaxs_numbers_are_ignored_and_said(tmp_path):
    env = {"JAX_ENABLE_X64": "1", "JAX_TRANSFER_GUARD": "disallow", "JAX_PLATFORMS": "cpu"}
    done = run(tmp_path, ARGUMENTS, env=env)
    assert done.stdout == "[] False False True\n"
    said = "is ignored: it changes what jax computes or allows\n"
    assert done.stderr == f"JAX_ENABLE_X64 {said}JAX_TRANSFER_GUARD {said}"


def test_deleted_working_folder_ends_a_command_before_its_work(tmp_path):
    (tmp_path / "gone").mkdir()
    script = "import os; os.chdir('gone'); os.rmdir(os.getcwd())" + ARGUMENTS
    done = run(tmp_path, script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {GONE}\n"


def test_an_error_that_ends_at_once_waits_for_no_thread(tmp_path):
    done = run(tmp_path, AT_ONCE, timeout=60)
    assert (done.returncode, done.stdout) == (2, "so far\n")
    assert done.stderr == "error: the save has failed\n"
