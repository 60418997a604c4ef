"""The speed of a run's steps, and what the device could do."""

import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import jax

# dense bfloat16 FLOP/s by part of the device's name, half of what data sheets print "with
# sparsity"; the first match counts
_PEAKS = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100 80GB HBM3", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
)


def peak_memory(device: jax.Device) -> int:
    """The most bytes that arrays have taken on the device; on a CPU, that the process has."""
    stats = device.memory_stats()
    if stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device; None if unknown, such as for a slice of a GPU."""
    if "MIG" in device_kind:
        return None
    return next((peak for name, peak in _PEAKS if name in device_kind), None)


@dataclass
class StepMeter:
    """Turns the times at which steps end into step time, throughput and utilization."""

    tokens_per_step: int
    flops_per_token: float  # forward and backward
    peak_flops: float | None  # of all devices together, if known
    clock: Callable[[], float] = time.perf_counter  # seconds
    _mark: tuple[int, float] | None = field(default=None, init=False)
    _ended: tuple[int, float] | None = field(default=None, init=False)
    # per step, recently
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32), init=False)

    def start(self, step: int) -> None:
        """Starts the clock when `step` is done, and after work that is no training."""
        self._mark = (step, self.clock())

    def ended(self, step: int) -> None:
        """Notes that `step` has ended, for a `stop` that follows after more work."""
        self._ended = (step, self.clock())

    def stop(self, step: int) -> dict[str, float]:
        """`step_ms`, `tok_per_s`, and `mfu` if the peak is known, since the last mark."""
        if self._mark is None or step <= self._mark[0]:
            raise ValueError(f"stop({step}) needs a start of an earlier step")
        now = self._ended[1] if self._ended and self._ended[0] == step else self.clock()
        seconds = max(now - self._mark[1], 1e-9) / (step - self._mark[0])
        self._mark = (step, now)
        self._seconds.append(seconds)
        rate = self.tokens_per_step / seconds
        result = {"step_ms": seconds * 1e3, "tok_per_s": rate}
        if self.peak_flops is not None:
            result["mfu"] = rate * self.flops_per_token / self.peak_flops
        return result

    def eta(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps take at the median of the last 32 step times."""
        return statistics.median(self._seconds) * steps_left if self._seconds else None
