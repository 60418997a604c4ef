"""Several processes that work on one model: how they find each other, decide together, and end
together.

The layout is one process a node with all of its GPUs: one copy of the host's work a node, and the
fast links between a node's GPUs inside of one process. Every process runs the same program on the
devices of all; the global batch of a step and the results do not depend on how many there are.

What a process must not decide by itself, because another's clock, signals or files may say
otherwise, is process 0's to say: `broadcast`, `first` and `agree`. All processes call these, and
`barrier`, in the same order from their main threads.

How an end spreads. Each process writes a sign of life to the coordination service every second and
reads the others'. One that ends by an error says so there; one that is silent for SILENCE seconds
counts as dead. The others end with one line on stderr and a status that is not 0. A collective
operation that waits for a dead process cannot keep them, since a thread of its own watches. jax's
own guard, which aborts with a stack trace, is set to twice the time.
"""

import contextlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import (
    # its client, the store of keys and values, has no public name; orbax takes the same way
    distributed,
)
from jax.experimental import multihost_utils

from sngpt_jax.base.errors import EXIT_LOST, EXIT_SIGINT, EXIT_USER_ERROR, UserError
from sngpt_jax.cluster import rendezvous
from sngpt_jax.cluster.coordinator import DONE
from sngpt_jax.cluster.layout import Layout, ProcessArguments, find_layout

T = TypeVar("T")

logger = logging.getLogger("sngpt_jax")

START = 300  # seconds in which process 0 has to come, and then all others
SILENCE = 40  # seconds without a sign of life after which a process counts as dead
_BEAT = 1.0  # seconds between signs of life
_LINGER = SILENCE + 10  # seconds that the coordination service outlives process 0
# broadcasts kept: every training step needs all processes and has one, so none is ever that far
# behind
_KEPT = 1000
_KEYS = "sngpt_jax"


# ---------------------------------------------------------------------------------------------- together

_member: "_Member | None" = None  # this process among several; None: it is alone


def index() -> int:
    """This process's number, 0 where it is alone. Process 0 prints and writes files."""
    return _member.layout.index if _member else 0


def count() -> int:
    """How many processes work together, 1 where this one is alone."""
    return _member.layout.count if _member else 1


@contextlib.contextmanager
def joined(arguments: ProcessArguments) -> Iterator[None]:
    """Makes this process one of several, if the options or Slurm say so; to be entered before jax
    has touched a device.

    An error that leaves the body ends the process here, with one line (a traceback for a bug), and
    then the others. After a body that ends without one the processes wait for each other. Raises
    `UserError` where they do not find each other.
    """
    global _member
    layout = find_layout(arguments)
    if layout is None:
        yield
        return
    _keep_stdout_for_results()
    _member = member = _Member(layout)
    try:
        member.meet()
        logger.info(
            f"{layout.count} processes, by {layout.source}; process 0 answers at"
            f" {layout.coordinator}"
        )
        if layout.index:  # what all would say is said by process 0
            for name in ("sngpt_jax", "sngpt_kernels"):
                logging.getLogger(name).setLevel(logging.ERROR)
        yield
        member.part()
    except BaseException as error:
        member.give_up(error)
    _member = None


def broadcast(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, for all of them: a JSON value. The others do not call
    `make`.
    """
    return _member.broadcast(make) if _member else make()


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Process 0 goes through the body before the others do, so that they find what it has made. No
    broadcasts inside.
    """
    if index():
        broadcast(lambda: None)
    yield
    if not index():
        broadcast(lambda: None)


def everywhere(make: Callable[[], T]) -> T:
    """What `make` gives in this process. Raises `UserError` in all processes where `make` does in
    any.
    """
    return _member.everywhere(make) if _member else make()


def barrier() -> None:
    """Returns when all processes have come here. gloo's first collective operation waits 30 s for
    the others and no longer.
    """
    if _member:
        _member.gather(None)


def agree(seconds: float, signal: int | None) -> tuple[float, int | None]:
    """Process 0's `seconds`, and a `signal` that any process has received, within two seconds: the
    same for all.
    """
    return _member.agree(seconds, signal) if _member else (seconds, signal)


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises `UserError` in all processes where one's `facts`, JSON values by what they are,
    differ from process 0's.
    """
    if _member is None:
        return
    for number, theirs in enumerate(every := _member.gather(dict(facts))):
        for name, expected in every[0].items():
            if (found := theirs.get(name)) != expected:
                raise UserError(
                    f"{name}: {expected} in process 0, {found} in process {number}; start all"
                    " processes with the same version, command and data, on nodes that are alike"
                )


# ---------------------------------------------------------------------------------------------- one of several


class _Member:
    """One process's connection to the others."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._service: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._broadcasts = self._gathers = 0
        self._signal: int | None = None  # that this process has received
        self._heard: int | None = None  # that another has
        self._gone: set[int] = set()  # those that are silent
        self._parted = threading.Event()
        # whoever takes it says why the process ends; never released
        self._leaving = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="processes", daemon=True)

    # ------------------------------------------------------------------------------------------ meeting and parting

    def meet(self) -> None:
        """Returns when all processes are there; ends this one if they do not come. Raises
        `UserError` where they are unlike.
        """
        me = self.layout
        if me.index == 0:
            self._service = rendezvous.serve(me, timeout=2 * SILENCE, linger=_LINGER)
        rendezvous.reach(me, START if me.index else 10)
        logger.info(f"process {me.index}: waiting for all {me.count} processes")
        others = (
            "start all of them, with the same --num-processes"
            if me.source == "options"
            else "did all tasks start?"
        )
        late = threading.Timer(
            START,
            self._end_with,
            (EXIT_USER_ERROR, f"not all of {me.count} processes came in {START} s; {others}"),
        )
        late.daemon = True
        late.start()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # it takes SIGTERM for itself, which the loop handles
        jax.config.update("jax_enable_preemption_service", False)
        # a cluster's proxy leads out of it, and gRPC would take it even to the next node
        os.environ.setdefault("no_grpc_proxy", me.coordinator.rpartition(":")[0].strip("[]"))
        jax.config.update("jax_check_proxy_envs", False)  # jax warns of such variables
        jax.distributed.initialize(  # waits for all
            me.coordinator,
            me.count,
            me.index,
            local_device_ids=me.local_devices or (),
            cluster_detection_method="deactivate",
            # of a second service in process 0 that jax insists on and nobody asks
            coordinator_bind_address="127.0.0.1:0",
            initialization_timeout=START + 60,  # when jax aborts with a stack trace
            heartbeat_timeout_seconds=2 * SILENCE,
            shutdown_timeout_seconds=2 * SILENCE,
        )
        late.cancel()
        self._client = distributed.global_state.client
        self._watcher.start()
        check_alike(
            {"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"}
        )
        # connects them, while nobody is late by compiling
        multihost_utils.sync_global_devices("meet")

    def part(self) -> None:
        """Waits until all processes have come to their end, and takes this one out. Whoever fails
        until then ends it.
        """
        self._say_end(0, "")
        self._all_have_ended(within=math.inf)
        self._parted.set()
        self._watcher.join()
        jax.distributed.shutdown()
        self._dismiss_service()

    def give_up(self, error: BaseException) -> NoReturn:
        """Ends this process for `error`, and lets the others know."""
        status, message = _verdict(error)
        # most often another's end: the watcher, who hears of it by then, ends this one
        if _is_lost_connection(error):
            wait = SILENCE + 5 * _BEAT
            self._print(f"{message}; waiting {wait:g} s to hear whether another process has ended")
            with contextlib.suppress(KeyboardInterrupt):
                self._parted.wait(wait)
        self._leaving.acquire()
        if isinstance(error, (UserError, KeyboardInterrupt)):
            self._print(message)
        # the one has said why, and nobody is left to tell the other
        elif not isinstance(error, (SystemExit, BrokenPipeError)):
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exception(error)
        self._leave(status, message)

    def _leave(self, status: int, message: str) -> NoReturn:
        """Says that this process ends, and ends it; process 0 stays, a little, for the others to
        hear of it.
        """
        try:
            _show_cursor()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if self._client is not None:
                    self._say_end(status, message)
                if self._client is None or self._all_have_ended(within=10 * _BEAT):
                    self._dismiss_service()
        finally:
            # the interpreter's own end would wait for the others, at jax's barrier
            os._exit(status)

    def _all_have_ended(self, within: float) -> bool:
        deadline = time.monotonic() + within
        while len(self._gone | self._read("end").keys()) < self.layout.count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _dismiss_service(self) -> None:
        if self._service and self._service.stdin:
            with contextlib.suppress(OSError):  # it is gone
                self._service.stdin.write(DONE)
                self._service.stdin.close()

    def _print(self, message: str) -> None:
        mark = f"process {self.layout.index}: " if self.layout.index else ""
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(f"{mark}error: {' '.join(message.split())}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------ what is said

    def broadcast(self, make: Callable[[], T]) -> T:
        self._broadcasts += 1
        key = f"{_KEYS}/broadcast/{self._broadcasts}"
        if self.layout.index:
            return json.loads(self._wait_for(key))
        text = json.dumps(make())
        self._client.key_value_set(key, text)
        if self._broadcasts > _KEPT:
            self._client.key_value_delete(f"{_KEYS}/broadcast/{self._broadcasts - _KEPT}")
        return json.loads(text)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in order."""
        self._gathers += 1
        prefix = f"{_KEYS}/gather/{self._gathers}"
        self._client.key_value_set(f"{prefix}/{self.layout.index}", json.dumps(value))
        return [json.loads(self._wait_for(f"{prefix}/{i}")) for i in range(self.layout.count)]

    def everywhere(self, make: Callable[[], T]) -> T:
        failure: UserError | None = None
        try:
            made = make()
        except UserError as error:
            failure = error
        failures = self.gather(failure and str(failure))
        if failure:
            raise failure
        for number, other in enumerate(failures):
            if other is not None:
                raise UserError(f"process {number}: {other}")
        return made

    def agree(self, seconds: float, signal: int | None) -> tuple[float, int | None]:
        self._signal = signal  # goes out with the next sign of life
        agreed: Any = self.broadcast(lambda: [seconds, signal or self._heard])
        return agreed[0], agreed[1]

    def _wait_for(self, key: str) -> str:
        while True:  # a second at a time, so that Ctrl-C is heard
            try:
                return self._client.blocking_key_value_get(key, 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _read(self, what: str) -> dict[int, Any]:
        """What the processes have said of their `life` or `end`, by process."""
        entries = self._client.key_value_dir_get(f"{_KEYS}/{what}/")
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in entries}

    def _say_end(self, status: int, message: str) -> None:
        """Without a message this process has come to its end, and the others may go on to theirs."""
        end = json.dumps([status, " ".join(message.split())])
        self._client.key_value_set(f"{_KEYS}/end/{self.layout.index}", end, allow_overwrite=True)

    # ------------------------------------------------------------------------------------------ who is there

    def _watch(self) -> None:
        """Gives signs of life and looks for the others' until this process parts; ends it where
        another has ended.
        """
        me = self.layout.index
        seen: dict[int, tuple[Any, float]] = dict.fromkeys(
            range(self.layout.count), (None, time.monotonic())
        )
        beat = 0
        while not self._parted.wait(_BEAT if beat else 0):
            beat += 1
            lives: dict[int, Any] = {}
            ends: dict[int, Any] = {}
            # the service does not answer: nobody is heard
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                life = json.dumps([beat, self._signal])
                self._client.key_value_set(f"{_KEYS}/life/{me}", life, allow_overwrite=True)
                lives, ends = self._read("life"), self._read("end")
            for number, (status, message) in ends.items():
                if message and number != me:
                    self._end_with(status, f"process {number} has ended: {message}")
            for number, life in lives.items():
                self._heard = life[1] or self._heard
                if seen[number][0] != life:
                    seen[number] = (life, time.monotonic())
            silent = [
                number
                for number, (_, when) in seen.items()
                if time.monotonic() - when > SILENCE and number not in ends
            ]
            if me in silent:
                self._end_with(
                    EXIT_LOST,
                    f"{self.layout.coordinator}, where processes meet, has not answered for"
                    f" {SILENCE} s",
                )
            if silent:
                self._gone = set(silent)
                self._end_with(
                    EXIT_LOST,
                    f"process {', '.join(map(str, silent))} has given no sign of life for {SILENCE}"
                    " s: killed, or its node is gone; start all processes again",
                )

    def _end_with(self, status: int, message: str) -> NoReturn:
        self._leaving.acquire()
        if status:
            self._print(message)
        self._leave(status, message)


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit status and the message that stand for what ended a process."""
    match error:
        case UserError():
            return EXIT_USER_ERROR, str(error)
        case KeyboardInterrupt():
            return EXIT_SIGINT, "interrupted"
        case SystemExit():
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            return status, f"status {status}"
        case BrokenPipeError():  # `… | head`: no error, as where a process is alone
            return 0, "its output is closed"
        case _:
            return 1, f"{type(error).__name__}: {error}"


def _is_lost_connection(error: BaseException) -> bool:
    """Whether `error` looks as if another process were gone."""
    text = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return "Gloo" in text
    return (
        "RESOURCE_EXHAUSTED" not in text
        and re.search("[Gg]loo|NCCL|UNAVAILABLE|[Cc]onnection", text) is not None
    )


def _show_cursor() -> None:
    """rich hides a terminal's cursor beside its live line, and `os._exit` leaves it no time to
    show it again.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if os.isatty(stream.fileno()):
                os.write(stream.fileno(), b"\x1b[?25h")


def _keep_stdout_for_results() -> None:
    """gloo, in C++, writes to stdout when processes connect; from here on that goes to stderr.
    Nothing waits to be flushed.
    """
    sys.stdout.flush()
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    now = sys.stdout
    sys.stdout = open(results, "w", encoding=now.encoding, errors=now.errors, buffering=1)  # noqa: SIM115 - closed by the interpreter
