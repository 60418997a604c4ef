"""The memory of this machine, in bytes."""

import contextlib
import os
import re
import sys
from pathlib import Path


def shown(size: int) -> str:
    """`size` bytes for a person."""
    return f"{size / 2**30:.3g} GiB"


def host_memory() -> int:
    """The bytes that the machine, and the control groups (v2) of this process, have left."""
    left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, own = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if not meminfo.is_file():  # not Linux
        return left
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", meminfo.read_text()))
    left = 1024 * (int(found["MemAvailable"]) + int(found["SwapFree"]))
    group = Path("/sys/fs/cgroup", own.read_text().rpartition("0::/")[2].strip())
    for folder in (group, *group.parents):
        limit, used = folder / "memory.max", folder / "memory.stat"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            # the group's other pages are caches, which it gives back
            anonymous = dict(map(str.split, used.read_text().splitlines()))["anon"]
            left = min(left, int(text) - int(anonymous))
    return left


def of_devices() -> str:
    """What jax's first device has, as the end of a line; of a CPU, what the machine has left."""
    jax, stats = sys.modules.get("jax"), None  # this layer does not import it
    with contextlib.suppress(RuntimeError):  # of a backend that does not start
        stats = jax and jax.local_devices()[0].memory_stats()
    if stats:
        has, used = stats["bytes_limit"], stats["bytes_in_use"]
        return f"; the device has {shown(has)}, of which {shown(used)} are in use"
    return f"; the machine has {shown(host_memory())} left"
