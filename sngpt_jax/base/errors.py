"""The error that a user can mend, and the exit statuses of every command."""

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_OVER_LIMIT = 4
EXIT_LOST = 5  # another process of the same job is gone
EXIT_SIGHUP = 129
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class UserError(Exception):
    """A mistake of the user's: one line that says what was wrong, where, and what to do."""

    # whether the process is to end as soon as that is said, without waiting for what else is at
    # work in it
    at_once = False
