"""The choice of an implementation by the device that the code is traced for, logged once.

An implementation that cannot serve the arguments raises `CannotServe`. It is never replaced
silently.
"""

import contextlib
import functools
import importlib
import importlib.util
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
    """An implementation cannot serve this device or these shapes. The message says why."""


@dataclass(frozen=True)
class Device:
    """A device that code is traced for."""

    platform: str  # cpu, cuda, rocm or tpu
    kind: str  # jax's name: NVIDIA H100 80GB HBM3
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability; (0, 0) on other platforms


_target = jax.make_user_context(default_value=None)  # part of the key of jax's caches


def current_device() -> Device:
    """The device that code traced now runs on: `targeting`'s, else jax's default device."""
    # a device, the name of a platform, or None
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return _target.value or _device(device)


@functools.cache
def _device(device: jax.Device) -> Device:
    if device.platform != "gpu":
        return Device(device.platform, device.device_kind)
    if "rocm" in device.client.platform_version.lower():  # "gpu" to jax as well
        return Device("rocm", device.device_kind)
    major, minor = map(int, device.compute_capability.split("."))
    return Device("cuda", device.device_kind, (major, minor))


@contextlib.contextmanager
def targeting(device: Device) -> Iterator[None]:
    """Inside, code is traced for `device`, which may be absent."""
    with _target(device):
        yield


def describe(array: jax.Array) -> str:
    """The dtype and shape of an array, for a message."""
    return f"{array.dtype} {list(array.shape)}"


def check_name(implementation: str | None, names: tuple[str, ...]) -> None:
    """Raises ValueError unless `implementation` is None or one of `names`."""
    if implementation not in (None, *names):
        expected = f"one of {', '.join(names)}, or None"
        raise ValueError(f"implementation is {implementation!r}; expected {expected}")


def check_nvidia(implementation: str, device: Device) -> None:
    """Raises CannotServe unless the device is an NVIDIA GPU of compute capability 8.0 or later."""
    if device.platform != "cuda":
        raise CannotServe(f"{implementation} serves NVIDIA GPUs; the device is {device.platform}")
    if device.capability < (8, 0):
        has = "{} has {}.{}".format(device.kind, *device.capability)
        raise CannotServe(f"{implementation} serves compute capability 8.0 and later; {has}")


_distrusted: dict[str, str] = {}


def distrust(operation: str, reason: str) -> None:
    """Makes the operation's kernels refuse to serve, for `reason`, from the next trace on.

    An empty `reason` trusts them again.
    """
    _distrusted[operation] = reason


def pallas_triton(operation: str, device: Device) -> Any:
    """The module of an operation's kernels. Raises CannotServe if it cannot run on the device, or
    is not trusted.
    """
    check_nvidia("pallas_triton", device)
    check_trusted("pallas_triton", operation)
    return backend(operation, "pallas_triton")


def check_trusted(implementation: str, operation: str) -> None:
    """Raises CannotServe if the operation's kernels are distrusted."""
    if reason := _distrusted.get(operation):
        raise CannotServe(f"{implementation} is not used: {reason}")


def backend(operation: str, name: str) -> Any:
    """The module `name` of an operation. Raises CannotServe if this program lacks the module."""
    # It is imported by name, so that a bundled program can do without it.
    module = f"sngpt_kernels.{operation}.{name}"
    if importlib.util.find_spec(module) is None:
        raise CannotServe(f"{name} is no part of this program")
    return importlib.import_module(module)


def check_heads(operation: str, device: Device, head_size: int, most: int) -> None:
    """Raises CannotServe if the operation's kernels cannot serve heads of that size there."""
    pallas_triton(operation, device)
    if head_size % 8 or head_size > most:
        served = f"pallas_triton serves head sizes of 8, 16, … {most}"
        raise CannotServe(f"{served}; the heads have {head_size}")


def kernel_or_xla(
    operation: str,
    implementation: str | None,
    check: Callable[[], None],
    entry: dict[str, Any],
    arguments: str,
    unmeasured: str = "",
) -> str:
    """`pallas_triton` or `xla`, here and now, logged with its reason.

    Args:
      operation: as the log names it.
      implementation: the one that is named; None chooses.
      check: raises CannotServe, with the reason, if the kernels cannot serve.
      entry: of these arguments in the device's table.
      arguments: what `entry` was measured for, in words.
      unmeasured: why the choice without a measurement is `xla`; empty: it is `pallas_triton`.

    Raises: what `check` raises, if the kernels are named.
    """
    check_name(implementation, ("xla", "pallas_triton"))
    measured = entry.get("implementation", "xla" if unmeasured else "pallas_triton")
    chosen = implementation or "pallas_triton"
    reason = "as asked" if implementation else "on an NVIDIA GPU, where no measurement says another"
    if chosen == "pallas_triton":
        try:
            check()
        except CannotServe as error:
            if implementation:
                raise
            chosen, reason = "xla", str(error)
    if not implementation and measured == "xla" != chosen:
        fastest = f"the fastest measured on {current_device().kind}, {arguments}"
        chosen, reason = "xla", fastest if "implementation" in entry else unmeasured
    announce(operation, chosen, reason)
    return chosen


def without_derivative(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a part of the operation's gradient. Its own derivative raises CannotServe."""

    def refuse(primals: Any, tangents: Any) -> Any:
        message = f"pallas_triton: the gradient of {operation} has no derivative; xla has one"
        raise CannotServe(message)

    result = jax.custom_jvp(function)
    result.defjvp(refuse)
    return result


_choices: list[str] | None = None


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[str]]:
    """Inside, the implementations that are chosen enter the list, and no line is logged."""
    global _choices
    choices: list[str] = []
    _choices = choices
    try:
        yield choices
    finally:
        _choices = None


def announce(operation: str, implementation: str, reason: str) -> None:
    """Logs the choice, or records it inside `recorded_choices`."""
    if _choices is None:
        log_choice(operation, implementation, reason)
    else:
        _choices.append(implementation)


@functools.cache
def log_choice(operation: str, implementation: str, reason: str) -> None:
    """Logs the choice the first time that a process makes it."""
    log.info("%s runs as %s: %s", operation, implementation, reason)


def table_name(kind: str) -> str:
    """The file name of a device's table: nvidia_h100_80gb_hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json"


@functools.cache
def tuned(package: str, kind: str) -> dict[str, Any]:
    """The table of `package` for devices of that kind: keys → fastest implementation and config."""
    table = resources.files(package) / "tuned" / table_name(kind)
    return json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
