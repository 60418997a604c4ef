"""Where the processes of a job find each other: process 0 starts the coordination service, all
wait until it answers.
"""

import errno
import logging
import socket
import subprocess
import sys
import time

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.coordinator import READY
from sngpt_jax.cluster.layout import Layout

logger = logging.getLogger("sngpt_jax")


def serve(layout: Layout, *, timeout: int, linger: int) -> "subprocess.Popen[bytes]":
    """Starts the coordination service at the coordinator's port of this node, once that is free,
    and returns when it serves.

    `timeout` and `linger` are `coordinator.main`'s, in seconds. Raises `UserError` where the port
    cannot be used.
    """
    port = int(layout.coordinator.rpartition(":")[2])
    where = f"port {port} of process 0's node, where processes are to meet"
    other = (
        "choose another in --coordinator"
        if layout.source == "options"
        else "submit again: a job's number gives the port"
    )
    # that of a job that has just been killed is still there
    deadline = time.monotonic() + linger + 5
    told = False
    while True:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            break
        except (OSError, OverflowError) as error:
            if (
                time.monotonic() > deadline
                or not isinstance(error, OSError)
                or error.errno != errno.EADDRINUSE
            ):
                raise UserError(f"{where}, cannot be used: {error}; {other}") from None
        if not told:
            told = True
            logger.info(
                f"{where}, is in use, as by a job that has just ended: waiting {linger + 5} s at"
                " most"
            )
        time.sleep(0.5)
    service = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sngpt_jax.cluster.coordinator",
            f"[::]:{port}",
            *map(str, (layout.count, timeout, linger)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for those who train
    )
    assert service.stdout and service.stderr
    said = service.stdout.readline().decode().strip()
    if said != READY:
        died_of = service.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        reason = said or died_of or f"the service ended with status {service.wait()}"
        raise UserError(f"{where}: nothing could be started there: {reason}; {other}")
    service.stderr.close()
    return service


def reach(layout: Layout, within: float) -> None:
    """Returns when something listens at the coordinator's address: jax would abort with a stack
    trace if nothing ever did.

    Raises `UserError` where nothing does `within` so many seconds.
    """
    where = f"{layout.coordinator}, where processes are to meet"
    host, _, port = layout.coordinator.rpartition(":")
    deadline = time.monotonic() + within
    told = False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except socket.gaierror as error:
            raise UserError(
                f"{where}: {host}: {error.strerror}; --coordinator is to name process 0's node"
            ) from None
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{where}: no answer in {within:g} s: {error}; is process 0 up, and that its"
                    " node's address?"
                ) from None
        if not told:
            told = True
            logger.info(
                f"process {layout.index}: waiting for process 0 to answer at {layout.coordinator}"
            )
        time.sleep(0.5)
