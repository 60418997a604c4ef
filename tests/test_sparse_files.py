"""Files that claim more than the memory holds: each is one line, before it is read as a whole.

The files are sparse, so they take no room on the disk. A child process reads them with little
address space, as under `ulimit -v`.
"""

import json
import os
import re
import struct
import subprocess
import sys

import pytest

from sngpt_jax.artifact.sngpt_file import DIGEST, HEAD, MAGIC

SIZE = 30 * 2**30

READ = """
import resource, sys
from pathlib import Path
from sngpt_jax.artifact import sngpt_file
from sngpt_jax.base.errors import one_line
from sngpt_jax.data.shards import open_extra
from sngpt_jax.weights.state_dict_files import read_state_dict

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (used + 2**29,))
readers = {".sngpt": sngpt_file.read, ".npy": lambda path: open_extra(path, 10**6, 2)}
for name in sys.argv[1:]:
    path = Path(name)
    try:
        readers.get(path.suffix, read_state_dict)(path)
    except Exception as error:
        print(one_line(error) or f"BUG {error!r}")
    else:
        print("was read")
"""


def npy_header(shape):
    text = repr({"descr": "<i8", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def safetensors_header(size):
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    text = json.dumps({"w": tensor}).encode()
    return struct.pack("<Q", len(text)) + text


EMPTY = safetensors_header(0)
ROWS = (SIZE - len(npy_header((1, 2)))) // 16
LARGE = safetensors_header(SIZE)
FILES = {
    "zeros.sngpt": (b"", SIZE, "not an artifact: begins with"),
    "other_length.sngpt": (HEAD.pack(MAGIC, 2, 9, 9), SIZE, "continues after its end"),
    "claims.sngpt": (
        HEAD.pack(MAGIC, 2, 9, SIZE - HEAD.size - DIGEST - 9),
        SIZE,
        "needs 90 GiB of memory to read, and the machine has|out of memory",
    ),
    "a.extra.npy": (
        npy_header((ROWS, 2)),
        len(npy_header((ROWS, 2))) + 16 * ROWS,
        "at most|allocate memory",
    ),
    "b.extra.npy": (npy_header((4, 2)), SIZE, "expected ascending token positions"),
    "zeros.safetensors": (b"", SIZE, "cannot be read as a .safetensors|of memory left"),
    "large.safetensors": (LARGE, len(LARGE) + SIZE, "of memory left|out of memory|cannot be read"),
    "zeros.npz": (b"", SIZE, "not a zip archive|of memory left"),
}


@pytest.mark.slow
def test_files_that_claim_too_much_are_one_line(tmp_path):
    for name, (start, size, _) in FILES.items():
        (tmp_path / name).write_bytes(start)
        os.truncate(tmp_path / name, size)
    child = [sys.executable, "-c", READ, *(tmp_path / name for name in FILES)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == len(FILES), done.stdout + done.stderr
    for name, line in zip(FILES, lines, strict=True):
        assert re.search(FILES[name][2], line) and name in line, line
