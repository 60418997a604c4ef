"""Errors that a user can correct, their one line, and exit statuses."""

import errno
import os
import re

from sngpt_jax.base import memory

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_OVER_LIMIT = 4
EXIT_LOST = 5  # another process of the job is gone
EXIT_SIGHUP = 129
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

# The disk, the user's quota, or the largest allowed file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EIO, errno.ESTALE)  # a disk or a network file system that fails


class UserError(Exception):
    """A user's mistake. The message says in one line what was wrong, where, and what to do."""

    at_once = False  # whether the process then ends without waiting for its threads


def one_line(error: BaseException) -> str | None:
    """The line that a user reads of `error`; None if `error` is a bug.

    Only this function turns an error of the system into a line: other code lets such errors pass,
    unless it knows more than the path and the reason. An `OSError` without a path is a bug, unless
    its number says that the machine failed.
    """
    match error:
        case UserError():
            return " ".join(str(error).split())
        case MemoryError() | OSError(errno=errno.ENOMEM):
            reason = f": {error}" if str(error) else ""
            return f"out of memory{reason}; choose smaller sizes or a machine with more memory"
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):  # jax's, which base cannot name
            asked = str(error).partition("RESOURCE_EXHAUSTED: ")[2].split("\n")[0][:200]
            return (
                f"the device has too little memory: {asked.rstrip('. ')}{memory.of_devices()};"
                " lower --train.device-batch-tokens (training) or --eval.device-batch-tokens"
                " (scoring), or take a device with more memory"
            )
        case OSError(errno=number) if number in (errno.EMFILE, errno.ENFILE):
            return f"{error.strerror}; raise the limit of open files with ulimit -n"
        case FileNotFoundError(errno=errno.ENOENT, filename=None):
            return "the working folder is gone; change into a folder that exists"
        case UnicodeDecodeError():
            return f"text is not {error.encoding}: {error.reason} at byte {error.start}"
        case OSError(errno=number) if number in FULL:
            where = _path(error) or "stdout, or a file,"
            return f"{where} cannot be written: {error.strerror}; free space and start again"
        case OSError(errno=number) if error.filename is not None or number in _BROKEN:
            where = _path(error) or "a file"
            return f"{where}: {error.strerror}; check the path and its permissions"
    return None


def _path(error: OSError) -> str:
    """The file that the user knows, where an atomic write has failed on its temporary file."""
    path = error.filename if error.filename2 is None else error.filename2
    return "" if path is None else re.sub(r"\.tmp-\d+$", "", os.fsdecode(path))
