"""The code that decodes and scores an artifact, as one small file: `python model.pyz model.sngpt --data DIR`.

The entry and what it needs of the project (`closure.py`) are minified and compressed together. The file is that stream with a
zip archive of one line behind it: Python runs a zip's `__main__.py`, a zip may have anything before it, and so the code costs
its compressed bytes and 220 more, where text in a .py file would cost a quarter more. The archive unpacks nothing: an importer
serves the modules from memory, before any installed ones of the same name. Libraries are not in it.
"""

import ast
import io
import json
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import python_minifier

from sngpt_jax.cli import UserError
from sngpt_jax.export.closure import closure

ROOT = Path(__file__).parents[2]
PROJECT = ("sngpt_jax", "kernels")
ENTRY = "sngpt_jax.export.scorer"

# What the compressed text begins with. `_` is the list of the parts after it: entry's package, entry, name, source, name, ….
# A package's name ends in a dot. A module that is not here is not looked for anywhere else: packages have an empty path.
_IMPORTER = """
import sys
from importlib.machinery import ModuleSpec
class Importer:
    sources = dict(zip(_[2::2], _[3::2]))
    def find_spec(self, name, path=None, target=None):
        for key in (name, name + "."):
            if key in self.sources:
                return ModuleSpec(name, self, is_package=key != name)
    def create_module(self, spec):
        pass
    def exec_module(self, module):
        name = module.__name__
        exec(compile(self.sources.get(name) or self.sources.get(name + ".", ""), name, "exec"), module.__dict__)
sys.meta_path.insert(0, Importer())
__package__ = _[0]
exec(_[1])
"""
_MAIN = """import sys,lzma
s,*_=lzma.decompress(open(sys.argv[0],'rb').read({size})).decode().split('\\0')
exec(s)"""


@dataclass(frozen=True)
class Bundle:
    """A bundle and what is in it."""

    data: bytes
    files: tuple[tuple[str, int], ...]  # path of each source file and the bytes that are left of it, before compression
    libraries: tuple[str, ...]  # that must be installed where it runs


def build(entry: str = ENTRY, root: Path = ROOT, project: Sequence[str] = PROJECT) -> Bundle:
    """The bundle that runs module `entry` of the top-level packages `project` in the folder `root`, as `python -m` would.

    The same sources give the same bytes with one version of Python.
    """
    needed = closure(entry, root, project)
    sources = {name: minify(tree) for name, tree in needed.modules.items()}
    parts = [minify(ast.parse(_IMPORTER)), entry.rpartition(".")[0], sources[entry]]
    for name, source in sources.items():
        if name != entry:
            parts += [name + "." * (name in needed.packages), source]
    return Bundle(
        _pack("\0".join(parts).encode()),
        tuple(
            (name.replace(".", "/") + ("/__init__.py" if name in needed.packages else ".py"), len(source.encode()))
            for name, source in sources.items()
        ),
        needed.libraries,
    )


def minify(tree: ast.Module) -> str:
    """The source of `tree` without docstrings and comments, with short names for what is local."""
    # literals stay where they are: the compressor finds repeated ones, for less than the names that would stand for them
    return python_minifier.minify(
        ast.unparse(tree), remove_literal_statements=True, hoist_literals=False, prefer_single_line=True
    )


def _pack(text: bytes) -> bytes:
    # the .lzma container has the smallest header; pb=0 since no byte of text depends on its place among four
    lzma1 = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}
    code = lzma.compress(text, format=lzma.FORMAT_ALONE, filters=[lzma1])
    file = io.BytesIO()
    file.write(code)
    with zipfile.ZipFile(file, "a") as archive:  # stored: one line does not compress
        archive.writestr(zipfile.ZipInfo("__main__.py"), _MAIN.format(size=len(code)))  # ZipInfo's date is always 1980-01-01
    return file.getvalue()


def run(bundle: Path, artifact: Path, data: Path | None = None, tokens: int = 0) -> dict[str, Any]:
    """What the bundle finds in `artifact`, and its score on the first `tokens` (0: all) validation tokens of `data`.

    Runs in a process of its own, in an empty folder, without this process's import path. Raises `UserError` with the last
    line that it wrote where it fails.
    """
    command = [sys.executable, "-I", str(bundle.absolute()), str(artifact.absolute()), "--json"]
    if data:
        command += ["--data", str(data.absolute()), "--tokens", str(tokens)]
    # this process may hold most of an accelerator's memory: the other one is to take no more than it needs
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{bundle}: fails when it is run alone: {lines[-1].removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
