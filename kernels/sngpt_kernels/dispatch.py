"""Which implementation of an operation runs: by the device that the code is traced for, said once
in the log.

An implementation that cannot serve the arguments raises `CannotServe` with the reason; it is never
replaced silently.
"""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax

log = logging.getLogger("sngpt_kernels")


class CannotServe(NotImplementedError):
    """An implementation does not do what was asked of it, on this device or for these shapes; the
    message says why.
    """


@dataclass(frozen=True)
class Device:
    """What code is traced for."""

    platform: str  # cpu, cuda, rocm or tpu
    kind: str  # as jax names it: NVIDIA H100 80GB HBM3
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability; (0, 0) elsewhere


_target = jax.make_user_context(default_value=None)  # part of the key of jax's caches


def current_device() -> Device:
    """The device that code traced now runs on: the one of `targeting`, else jax's default device."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    return _target.value or _describe(
        default if isinstance(default, jax.Device) else jax.devices(default)[0]
    )


@functools.cache
def _describe(device: jax.Device) -> Device:
    if device.platform != "gpu":
        return Device(device.platform, device.device_kind)
    if "rocm" in device.client.platform_version.lower():  # jax calls both kinds of GPU so
        return Device("rocm", device.device_kind)
    major, minor = map(int, device.compute_capability.split("."))
    return Device("cuda", device.device_kind, (major, minor))


@contextlib.contextmanager
def targeting(device: Device) -> Iterator[None]:
    """Inside, code is traced for `device`, which need not be here: to compile for it ahead of
    time.
    """
    with _target(device):
        yield


def check_nvidia(implementation: str, device: Device) -> None:
    """Raises CannotServe, with the reason, where the device is no NVIDIA GPU of compute capability
    8.0 (Ampere) or later.
    """
    if device.platform != "cuda":
        raise CannotServe(f"{implementation} serves NVIDIA GPUs; the device is {device.platform}")
    if device.capability < (8, 0):
        major, minor = device.capability
        raise CannotServe(
            f"{implementation} serves compute capability 8.0 and later; {device.kind} has"
            f" {major}.{minor}"
        )


def without_derivative(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, a part of the operation's gradient, whose own derivative is refused in
    a sentence.
    """

    def refuse(primals: Any, tangents: Any) -> Any:
        raise CannotServe(
            f"pallas_triton: the gradient of {operation} has no derivative; xla has one"
        )

    result = jax.custom_jvp(function)
    result.defjvp(refuse)
    return result


@functools.cache
def announce(operation: str, implementation: str, reason: str) -> None:
    """One line of the log for each choice that a process makes."""
    log.info("%s runs as %s: %s", operation, implementation, reason)


@functools.cache
def tuned(package: str, kind: str) -> dict[str, Any]:
    """What is tuned for devices of that kind in `package`, from its folder `tuned`; nothing where
    there is no table for it.
    """
    name = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    table = resources.files(package) / "tuned" / f"{name}.json"
    return json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
