"""Errors that a user can mend, the one line that a user sees of them, and the exit statuses of every command."""

import errno

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_OVER_LIMIT = 4
EXIT_LOST = 5  # another process of the same job is gone
EXIT_SIGHUP = 129
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

# The disk, this user's share of the disk, or the largest file that is allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EIO, errno.ESTALE)  # a disk or a network file system that fails


class UserError(Exception):
    """A user's mistake. The message is one line: what was wrong, where, and what to do."""

    # Whether the process ends as soon as the line is printed, without waiting for its threads.
    at_once = False


def one_line(error: BaseException) -> str | None:
    """What a user reads of `error`, in one line; None where `error` is a bug and shows its traceback.

    This is the only place that turns an `OSError`, a `MemoryError` or a decoding error into a line.
    Code below a command lets such errors pass, unless it knows more than the path and the reason.
    """
    match error:
        case UserError():
            return " ".join(str(error).split())
        case MemoryError():
            reason = f": {error}" if str(error) else ""
            return f"out of memory{reason}; choose smaller sizes or a machine with more memory"
        case UnicodeDecodeError():
            return f"text is not {error.encoding}: {error.reason} at byte {error.start}"
        case OSError(errno=number) if number in FULL:
            where = error.filename or "stdout, or a file,"
            return f"{where} cannot be written: {error.strerror}; free space and start again"
        case OSError(errno=number) if error.filename is not None or number in _BROKEN:
            where = error.filename if error.filename is not None else "a file"
            return f"{where}: {error.strerror}; check the path and its permissions"
    return None
