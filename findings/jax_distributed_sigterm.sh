#!/usr/bin/env bash
# jax.distributed: initialize() disables a SIGTERM handler that the program has set before.
#
# One would guess: a Python handler for SIGTERM runs when a scheduler asks the job to end. The
# handler saves a checkpoint. Joining a cluster does not change that.
# What happens: initialize() starts a preemption service, which catches SIGTERM below Python. The
# handler never runs, and the process continues. `signal.getsignal` still returns the handler. Jax
# logs one line. The handler runs if it is set after initialize(). It also runs if the option
# jax_enable_preemption_service is False before initialize().
# Why it matters: many programs set their handlers first and join the cluster later. A single
# process then stops cleanly. As part of a cluster the same program ignores SIGTERM until it is
# killed, and loses all work since the last checkpoint.
# Seen with: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11, Linux, one process on localhost.
#
# Output:
#   jax 0.10.2
#   with the service: the handler set before initialize() ran: False
#   with the service: the handler set after initialize() ran: True
#   without the service: the handler set before initialize() ran: True
#   without the service: the handler set after initialize() ran: True

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"
unset PYTHONPATH XLA_FLAGS
export JAX_PLATFORMS=cpu

cat >program.py <<'PY'
import os
import signal
import socket
import sys
import time

import jax

called = []
signal.signal(signal.SIGTERM, lambda number, frame: called.append("first"))
if sys.argv[1] == "without":
    jax.config.update("jax_enable_preemption_service", False)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)


def handled():
    """Sends SIGTERM to this process, and returns whether a Python handler ran within a second."""
    called.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    return bool(called)


first = handled()
signal.signal(signal.SIGTERM, lambda number, frame: called.append("second"))
second = handled()
if sys.argv[1] == "with":
    print("jax", jax.__version__)
print(f"{sys.argv[1]} the service: the handler set before initialize() ran: {first}")
print(f"{sys.argv[1]} the service: the handler set after initialize() ran: {second}")
if (first, second) != (sys.argv[1] == "without", True):
    sys.exit("the behaviour changed: SIGTERM now reaches other Python handlers")
PY
"$work/venv/bin/python" program.py with
"$work/venv/bin/python" program.py without
