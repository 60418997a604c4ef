"""The resources of a compiled kernel, read from its PTX and the assembler's report."""

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sngpt_jax.ahead import sass
from sngpt_jax.ahead.targets import INSTALL, MissingToolchain

_TENSOR_CORES = {  # products of small matrices
    "wgmma": r"wgmma\.mma_async",  # by a group of four warps (Hopper)
    "mma": r"(?<![\w.])mma\.sync",  # by one warp
    "tcgen05": r"tcgen05\.mma\b",  # by a whole block (Blackwell)
}
_SASS_BYTES = 16  # per machine instruction, from compute capability 7.0 on


@dataclass(frozen=True)
class Code:
    """One kernel's machine code. An instruction in a loop counts once."""

    name: str
    arch: str
    registers: int  # per thread
    spill_bytes: int  # that a thread stores and loads for lack of registers
    static_shared_bytes: int  # per block, beside the bytes of its launch
    wgmma: int
    mma: int
    tcgen05: int
    instructions: int  # including the padding at the end
    loops: sass.Loop | None = None  # where a disassembler read them


def find_ptxas() -> str:
    """The path of the assembler beside jax's plugin, else of the machine's.

    Raises MissingToolchain if there is none.
    """
    nvidia = importlib.util.find_spec("nvidia")  # a namespace of the packages that hold CUDA
    roots = (nvidia and nvidia.submodule_search_locations) or ()
    beside = [str(path) for root in roots for path in sorted(Path(root).glob("*/bin/ptxas"))]
    found = beside[0] if beside else shutil.which("ptxas")
    if found is None:
        needs = "reading compiled kernels needs ptxas, which comes with jax's CUDA plugin"
        raise MissingToolchain(f"{needs}; run: {INSTALL}")
    return found


def architectures(ptxas: str) -> set[str]:
    """The architectures that it can assemble for, such as sm_90a."""
    done = subprocess.run([ptxas, "--help"], capture_output=True, text=True)
    return set(re.findall(r"sm_\w+", done.stdout))


def assemble(ptxas: str, text: str, nvdisasm: str = "") -> list[Code]:
    """The kernels of a PTX module. Raises RuntimeError with the first complaint of ptxas."""
    if ".entry" not in text:
        return []
    arch = re.findall(r"^\.target (\w+)", text, re.M)[0]
    with tempfile.TemporaryDirectory(prefix="ptxas_") as folder:
        source, binary = Path(folder, "module.ptx"), Path(folder, "module.cubin")
        source.write_text(text, encoding="utf-8")
        command = [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas: {done.stderr.strip().splitlines()[0]}")
        sizes = code_sizes(binary.read_bytes())
        loops = sass.disassemble(nvdisasm, binary) if nvdisasm else {}
    resources = parse_resources(done.stderr)
    return [
        Code(
            name,
            arch,
            **resources[name],
            **cores(body),
            instructions=sizes[name] // _SASS_BYTES,
            loops=loops.get(name),
        )
        for name, body in split_entries(text).items()
    ]


def split_entries(text: str) -> dict[str, str]:
    """The bodies of the kernels of a PTX module, by name."""
    bodies = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)", text):
        start = text.index("\n{", match.end())
        bodies[match[1]] = text[start : text.index("\n}", start)]
    return bodies


def cores(body: str) -> dict[str, int]:
    """The number of instructions on tensor cores, by kind."""
    return {kind: len(re.findall(pattern, body)) for kind, pattern in _TENSOR_CORES.items()}


def parse_resources(log: str) -> dict[str, dict[str, int]]:
    """registers, spill_bytes and static_shared_bytes per kernel, from the log of `ptxas -v`."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        (registers,) = re.findall(r"Used (\d+) registers", part)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        shared = re.findall(r"(\d+) bytes smem", part)
        found[part.partition("'")[0]] = {
            "registers": int(registers),
            "spill_bytes": sum(map(int, spills)),
            "static_shared_bytes": sum(map(int, shared)),
        }
    return found


def code_sizes(cubin: bytes) -> dict[str, int]:
    """The bytes of machine code per kernel in a CUDA binary.

    It is a 64-bit little-endian ELF file with one section .text.NAME per kernel.
    """
    table, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    # name, offset, size
    headers = [struct.unpack_from("<I20xQQ", cubin, table + i * entry_size) for i in range(count)]
    names = cubin[headers[names_index][1] :]
    sizes = {names[start:].partition(b"\0")[0].decode(): size for start, _, size in headers}
    return {n.removeprefix(".text."): size for n, size in sizes.items() if n.startswith(".text.")}
