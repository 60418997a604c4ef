"""jax's coordination service in a process of its own, which process 0 of a job starts and which
outlives it.

jax's runtime aborts a process, with a stack trace, at the moment it loses this service. By default
the service lives in process 0 and dies with it; here the others have the time to notice, to say
what happened and to end by themselves.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence

from jaxlib import _jax

DONE, READY = b"done", "ready"


def main(argv: Sequence[str]) -> None:
    """Serves at ADDRESS for COUNT processes until a second after stdin says DONE, or LINGER
    seconds after stdin has ended.

    `argv` is ADDRESS COUNT TIMEOUT LINGER; TIMEOUT are the seconds of silence after which jax's
    own guard aborts. Says READY on stdout, or what stands against it.
    """
    address, (count, timeout, linger) = argv[0], map(int, argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # a job's signals reach all of its processes, and those are to save first
        signal.signal(number, signal.SIG_IGN)
    try:
        service = _jax.get_distributed_runtime_service(
            address, count, heartbeat_timeout=timeout, shutdown_timeout=timeout
        )
    except RuntimeError as error:
        print(" ".join(str(error).split()), flush=True)
        return
    # it would repeat there what the processes say
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    print(READY, flush=True)
    done = sys.stdin.buffer.read() == DONE
    time.sleep(1 if done else linger)  # those who have just said that they end have done so by then
    service.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
