"""How a command ends: Ctrl-C at any moment, a full disk, a file that is too large, threads that
are still at work.
"""

import errno
import os
import subprocess
import sys

import pytest

from sngpt_jax.base.errors import UserError, one_line
from sngpt_jax.base.files import write_text_atomic
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

def main(argv):
    os.kill(os.getpid(), signal.SIGINT)
    return 0

cli.run(main)
"""
PRINTS = """
from sngpt_jax.base import cli

def main(argv):
    print("x" * 100_000)
    return 0

cli.run(main)
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


def test_a_file_on_a_full_disk_is_named(tmp_path, monkeypatch):
    """The system's error of a write names no file."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_text_atomic(tmp_path / "a", "text")
    expected = f"{tmp_path}/a cannot be written: No room; free space and start again"
    assert one_line(caught.value) == expected and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a\nb"), "a b"),
        *(
            (
                OSError(number, "No room", "/a"),
                "/a cannot be written: No room; free space and start again",
            )
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ),
        (
            FileNotFoundError(errno.ENOENT, "Missing", "/a"),
            "/a: Missing; check the path and its permissions",
        ),
        (
            PermissionError(errno.EACCES, "Denied", "/a"),
            "/a: Denied; check the path and its permissions",
        ),
        (OSError(errno.EIO, "Broken"), "a file: Broken; check the path and its permissions"),
        (MemoryError(), "out of memory; choose smaller sizes or a machine with more memory"),
        (
            UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"),
            "text is not utf-8: invalid at byte 1",
        ),
        (OSError(errno.EPERM, "no file is named"), None),
        (ValueError("a bug"), None),
    ],
    ids=str,
)
def test_errors_of_the_system_are_one_line_and_bugs_are_none(error, line):
    assert one_line(error) == line


def test_an_error_that_ends_at_once_waits_for_no_thread(tmp_path):
    done = run(tmp_path, AT_ONCE, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "so far\n",
        "error: the save has failed\n",
    )
