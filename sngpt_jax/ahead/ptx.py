"""What a compiled kernel takes of a multiprocessor, read from its PTX and from what the assembler
says of it.
"""

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sngpt_jax.ahead.targets import INSTALL, MissingToolchain

# Each multiplies small matrices: for a group of four warps (Hopper), for one warp, for a whole
# block (Blackwell).
_TENSOR_CORES = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"(?<![\w.])mma\.sync",
    "tcgen05": r"tcgen05\.mma\b",
}
_SASS_BYTES = 16  # of a machine instruction, from compute capability 7.0 on


@dataclass(frozen=True)
class Code:
    """One kernel's machine code. Instructions are counted where they stand, however often they
    run.
    """

    name: str
    arch: str
    registers: int  # of a thread
    spill_bytes: int  # that a thread stores and loads because its registers do not suffice
    static_shared_bytes: int  # of a block, beside what its launch asks for
    wgmma: int
    mma: int
    tcgen05: int
    instructions: int  # with the padding at the end


def find_ptxas() -> str:
    """The assembler's path: the one installed beside jax's plugin, else the machine's. Raises
    MissingToolchain.
    """
    nvidia = importlib.util.find_spec("nvidia")  # a namespace of the packages that hold CUDA
    roots = nvidia.submodule_search_locations if nvidia is not None else None
    beside = [path for root in roots or () for path in sorted(Path(root).glob("*/bin/ptxas"))]
    found = str(beside[0]) if beside else shutil.which("ptxas")
    if found is None:
        raise MissingToolchain(
            f"reading compiled kernels takes ptxas, which comes with jax's CUDA plugin: {INSTALL}"
        )
    return found


def architectures(ptxas: str) -> set[str]:
    """What it can assemble for: sm_90a and the like."""
    return set(
        re.findall(
            r"sm_\w+", subprocess.run([ptxas, "--help"], capture_output=True, text=True).stdout
        )
    )


def assemble(ptxas: str, text: str) -> list[Code]:
    """The kernels of a PTX module; none for a module without. Raises RuntimeError with ptxas's
    first complaint.
    """
    entries = split_entries(text)
    if not entries:
        return []
    target = re.search(r"^\.target (\w+)", text, re.M)
    arch = target[1] if target else ""
    with tempfile.TemporaryDirectory(prefix="ptxas_") as folder:
        source, binary = Path(folder, "module.ptx"), Path(folder, "module.cubin")
        source.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [ptxas, "-v", f"-arch={arch}", source, "-o", binary], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"ptxas: {done.stderr.strip().splitlines()[0]}")
        sizes = code_sizes(binary.read_bytes())
    resources = parse_resources(done.stderr)
    return [
        Code(
            name=name,
            arch=arch,
            **resources[name],
            **count_tensor_cores(body),
            instructions=sizes[name] // _SASS_BYTES,
        )
        for name, body in entries.items()
    ]


def split_entries(text: str) -> dict[str, str]:
    """The bodies of a PTX module's kernels by name."""
    bodies = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)", text):
        start = text.index("\n{", match.end())
        bodies[match[1]] = text[start : text.index("\n}", start)]
    return bodies


def count_tensor_cores(body: str) -> dict[str, int]:
    """Instructions that use tensor cores, by kind."""
    return {kind: len(re.findall(pattern, body)) for kind, pattern in _TENSOR_CORES.items()}


def parse_resources(log: str) -> dict[str, dict[str, int]]:
    """registers, spill_bytes and static_shared_bytes of each kernel in what `ptxas -v` prints."""
    found = {}
    for part in re.split(r"(?=Compiling entry function ')", log)[1:]:
        name = re.match(r"Compiling entry function '([^']+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name and registers, part
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name[1]] = {
            "registers": int(registers[1]),
            "spill_bytes": sum(map(int, spills)),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    return found


def code_sizes(cubin: bytes) -> dict[str, int]:
    """Bytes of machine code of each kernel in a CUDA binary, a 64-bit little-endian ELF file: its
    sections .text.NAME.
    """
    table, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    # name, offset, size
    headers = [struct.unpack_from("<I20xQQ", cubin, table + i * entry_size) for i in range(count)]
    names = headers[names_index][1]
    sizes = {}
    for name_offset, _, size in headers:
        start = names + name_offset
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            sizes[name.removeprefix(".text.")] = size
    return sizes
