"""Which implementation of an operation runs: by the device that the code is traced for, said once in the log.

An implementation that cannot serve the arguments raises `CannotServe` with the reason; it is never replaced silently.
"""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax

log = logging.getLogger("kernels")


class CannotServe(NotImplementedError):
    """An implementation does not do what was asked of it, on this device or for these shapes; the message says why."""


@dataclass(frozen=True)
class Device:
    """What code is traced for."""

    platform: str  # cpu, cuda, rocm or tpu
    kind: str  # as jax names it: NVIDIA H100 80GB HBM3


_target = jax.make_user_context(default_value=None)  # part of the key of jax's caches


def current_device() -> Device:
    """The device that code traced now runs on: the one of `targeting`, else jax's default device."""
    return _target.value or _default_device()


@functools.cache
def _default_device() -> Device:
    device = jax.devices()[0]
    platform = device.platform
    if platform == "gpu":  # jax calls both kinds so
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return Device(platform, device.device_kind)


@contextlib.contextmanager
def targeting(device: Device) -> Iterator[None]:
    """Inside, code is traced for `device`, which need not be here: to compile for it ahead of time."""
    with _target(device):
        yield


@functools.cache
def announce(operation: str, implementation: str, reason: str) -> None:
    """One line of the log for each choice that a process makes."""
    log.info("%s runs as %s: %s", operation, implementation, reason)


@functools.cache
def tuned(package: str, kind: str) -> dict[str, Any]:
    """What is tuned for devices of that kind in `package`, from its folder `tuned`; nothing where there is no table for it."""
    name = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    table = resources.files(package) / "tuned" / f"{name}.json"
    return json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
