"""Several processes that work on one model: how they meet, decide together, and end together.

Every process runs the same program on the devices of all. Process 0 decides what another process
might decide differently, because its clock, signals or files differ: `broadcast`, `first` and
`agree`. All processes call these functions in the same order from their main threads.

An error ends its process at once, without jax's wait for the others. The others then fail in a
collective operation, or jax's heartbeats abort them (docs/clusters.md).

jax is imported where it is used, because reading a run needs none.
"""

import collections
import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np

from sngpt_jax.base import terminal
from sngpt_jax.base.errors import EXIT_LOST, EXIT_SIGINT, EXIT_USER_ERROR, UserError, one_line
from sngpt_jax.cluster.layout import Layout, ProcessArguments, find_layout

T = TypeVar("T")

logger = logging.getLogger("sngpt_jax")

# in seconds
START = 300  # in which all processes have to come
HEARTBEAT = 40  # without a heartbeat, after which a process counts as dead
_LINGER = 3  # in which the others can print the error that process 0 has printed
_DAY = 86_400

_layout: Layout | None = None  # this process among several; None: it is alone
_agreement: Any = None  # the array under way since the last call of `agree`


def index() -> int:
    """This process's number, from 0. Process 0 prints and writes files."""
    return _layout.index if _layout else 0


def count() -> int:
    """How many processes work together."""
    return _layout.count if _layout else 1


@contextlib.contextmanager
def joined(arguments: ProcessArguments) -> Iterator[None]:
    """Makes this process one of several, if the options or Slurm say so. Enter this before jax
    touches a device.

    An error that leaves the body ends the process here. After a body without an error the
    processes wait for each other.
    """
    global _layout
    layout = find_layout(arguments)
    if layout is None:
        yield
        return
    import jax

    _keep_stdout_for_results()
    try:
        _layout = layout
        _meet(layout)
        source = f"{layout.count} processes, by {layout.source}"
        logger.info(f"{source}; process 0 answers at {layout.coordinator}")
        if layout.index:  # process 0 logs what all would log
            for name in ("sngpt_jax", "sngpt_kernels"):
                logging.getLogger(name).setLevel(logging.ERROR)
        yield
        jax.distributed.shutdown()  # waits for all
    except BaseException as error:
        _end(error)
    _layout = None


def broadcast(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, a JSON value. The others do not call `make`."""
    if _layout is None:
        return make()
    return _gather(None if index() else make())[0]


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Process 0 runs the body before the others do. The body must not call this module."""
    if index():
        barrier()
    yield
    if not index():
        barrier()


def everywhere(make: Callable[[], T]) -> T:
    """What `make` returns in this process. A user's error in one process fails all."""
    if _layout is None:
        return make()
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        if one_line(error) is None:
            raise
        failure = error
    failures = _gather(failure and one_line(failure))
    if failure:
        raise failure
    for number, other in enumerate(failures):
        if other is not None:
            raise UserError(f"process {number}: {other}")
    return made


def barrier() -> None:
    """Returns when all processes have called it."""
    if _layout:
        _gather(None)


def agree(seconds: float, signal: int | None) -> tuple[float, int | None]:
    """What the processes passed to the call before this one: process 0's `seconds`, and a
    `signal` that any of them has received.

    So no device waits for the exchange. Only the first call waits for its own values.
    """
    global _agreement
    if _layout is None:
        return seconds, signal
    # float64 as bytes, since jax arrays hold float32
    given = _rows(np.array([seconds, signal or 0], np.float64).view(np.uint8))
    known, _agreement = given if _agreement is None else _agreement, given
    agreed = np.asarray(known).view(np.float64)
    return float(agreed[0, 0]), int(agreed[:, 1].max()) or None


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises `UserError` in all processes if the `facts`, JSON values, of one differ from those of
    process 0.
    """
    if _layout:
        _compare(_gather(dict(facts)))


def _compare(facts: list[dict[str, Any]]) -> None:
    for number, theirs in enumerate(facts):
        for name, expected in facts[0].items():
            if (found := theirs.get(name)) != expected:
                raise UserError(
                    f"{name}: {expected} in process 0, {found} in process {number}; start all"
                    " processes with the same version, command, data and kind of node"
                )


# ---------------------------------------- exchange


def _same(x: Any) -> Any:
    return x


def _rows(row: np.ndarray) -> Any:
    """The uint8 [n] of every process as [processes, n], in all of them. Does not wait."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(count(), -1), ("processes", "local"))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["processes"], []))
    rows = jax.make_array_from_process_local_data(split, row[None], (count(), row.size))
    return jax.jit(_same, out_shardings=whole)(rows)  # compiled once: `_same` is always the same


def _gather(value: Any) -> list[Any]:
    """The JSON `value` of every process, in order."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = np.array([text.size], np.int64).view(np.uint8)
    sizes = np.asarray(_rows(size)).view(np.int64)[:, 0]
    # a power of two, since every size is another program
    padded = np.zeros(1 << max(8, int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(_rows(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


# ---------------------------------------- meeting and parting


def _meet(layout: Layout) -> None:
    """Returns when all processes are there. Raises `UserError` if they are unlike, or if process 0
    cannot be reached; ends this process if some do not come.
    """
    import jax

    host, _, port = layout.coordinator.rpartition(":")
    host = host.strip("[]")
    try:
        socket.getaddrinfo(host, int(port))
    except socket.gaierror as error:
        raise UserError(
            f"{layout.coordinator}, where processes meet: {error}; --coordinator must name the node"
            " of process 0"
        ) from None
    if layout.index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"port {port} of process 0's node cannot be used: {error.strerror}; choose another"
                " in --coordinator, or submit the Slurm job again"
            ) from None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # the training loop handles SIGTERM, which this service would take
    jax.config.update("jax_enable_preemption_service", False)
    # a proxy leads out of the cluster, and gRPC would take it even to the next node
    os.environ.setdefault("no_grpc_proxy", host)
    jax.config.update("jax_check_proxy_envs", False)  # jax warns of proxy variables
    logger.info(f"process {layout.index}: waiting for all {layout.count} processes")
    missing = (
        f"not all of {layout.count} processes came in {START} s; start each with its own"
        f" --process-id and --coordinator {layout.coordinator}"
    )
    late = threading.Timer(START, _leave, (EXIT_USER_ERROR, missing))
    late.daemon = True
    late.start()
    before = signal.getsignal(signal.SIGINT)  # jax's wait would not hear Ctrl-C
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            layout.coordinator,
            layout.count,
            layout.index,
            local_device_ids=layout.local_devices or (),
            cluster_detection_method="deactivate",
            initialization_timeout=START + 60,  # `late` comes before it
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=_DAY,  # heartbeats end the wait for a process that is gone
        )
    finally:
        signal.signal(signal.SIGINT, before)
        late.cancel()
    devices = collections.Counter((x.process_index, x.device_kind) for x in jax.devices())
    _compare([{"devices": f"{n} x {kind}"} for (_, kind), n in sorted(devices.items())])
    barrier()  # connects the processes, while none is late by compiling


def _end(error: BaseException) -> NoReturn:
    """Ends this process for `error`. The interpreter's own end would wait for the others."""
    with contextlib.suppress(OSError, ValueError):
        terminal.clear()
    match error:
        case KeyboardInterrupt():
            _leave(EXIT_SIGINT, "interrupted")
        case SystemExit():
            _leave(error.code if isinstance(error.code, int) else int(error.code is not None))
        case BrokenPipeError():  # `… | head` is no error
            _leave(0)
    if line := one_line(error):
        _leave(EXIT_USER_ERROR, line)
    if _is_lost_connection(error):
        lost = f"another process is gone, and its own output may say why: {error}"
        _leave(EXIT_LOST, f"{lost}; start all processes again")
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)
    _leave(1)


def _leave(status: int, message: str = "") -> NoReturn:
    """Prints `message` and ends this process."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        if message:
            mark = f"process {index()}: " if index() else ""
            print(f"{mark}error: {' '.join(message.split())}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    # jax aborts the others once process 0 is gone: let them print the same error before
    if status == EXIT_USER_ERROR and not index():
        time.sleep(_LINGER)
    os._exit(status)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether `error` comes from a collective operation that misses another process."""
    import jax

    text = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return "Gloo" in text  # in an error of orbax
    lost = re.search("[Gg]loo|NCCL|UNAVAILABLE|[Cc]onnection", text)
    return lost is not None and "RESOURCE_EXHAUSTED" not in text


def _keep_stdout_for_results() -> None:
    """Sends to stderr what gloo, in C++, writes to stdout. Python keeps writing to stdout."""
    sys.stdout.flush()
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    now = sys.stdout
    # the interpreter closes it
    sys.stdout = open(results, "w", encoding=now.encoding, errors=now.errors, buffering=1)  # noqa: SIM115
