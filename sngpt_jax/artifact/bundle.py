"""The program that decodes and scores an artifact, as one file: `python model.pyz model.sngpt
--data DIR`.

The program holds whole modules: `sngpt_jax.score_artifact` and every module of the project that it
imports, directly or through others. They are minified and compressed together. A zip archive with
three lines of code follows the compressed stream: Python runs a zip's `__main__.py`, and a zip may
begin with other bytes. An importer serves the modules from memory, ahead of installed modules with
equal names. The program does not contain libraries.
"""

import ast
import bz2
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import python_minifier

from sngpt_jax.base.errors import UserError

logger = logging.getLogger("sngpt_jax")

PROJECT = ("sngpt_jax", "sngpt_kernels")
ENTRY = "sngpt_jax.score_artifact"
# Sources that replace modules: the program draws no progress bars, which need rich, measures no
# memory, and has no kernels of ours to choose.
STAND_INS = {
    "sngpt_jax.base.terminal": "def clear(): pass",
    "sngpt_jax.base.memory": """def of_devices(): return ''
def host_memory(): return 2**63
shown = str""",
    "sngpt_kernels.cayley.api": """from sngpt_kernels.cayley import xla
from sngpt_kernels.cayley.dictionary import Scheme
def encode_decode(*arrays, forward_standardized, generators, implementation):
    return xla.encode_decode(*arrays[:4], Scheme(arrays[4], forward_standardized, generators))""",
    "sngpt_kernels.epilogue.api": """from sngpt_kernels.epilogue import xla
def finish(*arrays, implementation): return xla.finish(*arrays)""",
    "sngpt_kernels.mlp.api": "def choose(*_): return 'xla'",
    "sngpt_kernels.rotary.api": "def choose(*_): return 'xla'",
    "sngpt_kernels.stream.xla": "pass",  # for the other implementations of `mlp` alone
    "sngpt_jax.model.lazy_stream": """from sngpt_jax.model.stream import Stream
def start(x, _): return Stream(x)""",
}
_ROWS = re.compile(r"(\d+) of (\d+) rows of windows")  # the entry's progress lines

# The compressed text begins with this source. `_` is the list of the parts behind it: the entry's
# package, the entry's source, then name and source of each module. A package's name ends in a dot.
# Packages have an empty path, so that Python looks for a missing module nowhere else.
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
        source = self.sources.get(name) or self.sources.get(name + ".", "")
        exec(compile(source, name, "exec"), module.__dict__)
sys.meta_path.insert(0, Importer())
__package__ = _[0]
exec(_[1])
"""
_MAIN = """import sys,bz2
s,*_=bz2.decompress(open(sys.argv[0],'rb').read({size})).decode().split('\\0')
exec(s)"""


@dataclass(frozen=True)
class Bundle:
    """A program and its contents."""

    data: bytes
    files: tuple[tuple[str, int], ...]  # path of each source file, and its bytes after minifying
    libraries: tuple[str, ...]  # top-level names of the libraries that it imports


def build(entry: str = ENTRY, project: Sequence[str] = PROJECT) -> Bundle:
    """The program that runs module `entry` of the top-level packages `project`, as `python -m`
    does. Equal sources give equal bytes. Every Python that runs the sources runs the program.
    """
    modules, libraries = _needed(entry, project)
    sources = {name: minify(tree) for name, (_, tree) in modules.items()}
    parts = [minify(ast.parse(_IMPORTER)), entry.rpartition(".")[0], sources[entry]]
    for name, (file, _) in modules.items():
        if name != entry:
            parts += [name + "." * file.endswith("/__init__.py"), sources[name]]
    code = bz2.compress("\0".join(parts).encode())  # leaves 2 % less than lzma at its best level
    program = io.BytesIO(code)
    with zipfile.ZipFile(program, "a") as archive:  # a ZipInfo's date is always 1980-01-01
        archive.writestr(zipfile.ZipInfo("__main__.py"), _MAIN.format(size=len(code)))
    files = ((file, len(sources[name].encode())) for name, (file, _) in modules.items())
    return Bundle(program.getvalue(), tuple(files), libraries)


def _needed(
    entry: str, project: Sequence[str]
) -> tuple[dict[str, tuple[str, ast.Module]], tuple[str, ...]]:
    """The modules that `entry` imports from `project`, directly or through others, at the top of a
    file or in a function: path and source by name. Then the libraries that these modules import.
    """
    roots = {}
    for package in project:
        spec = find_spec(package)
        assert spec and spec.origin
        roots[package] = Path(spec.origin).parents[1]
    modules: dict[str, tuple[str, ast.Module]] = {}
    libraries: set[str] = set()
    waiting = {entry}
    while waiting:
        name = waiting.pop()
        parent, top = name.rpartition(".")[0], name.partition(".")[0]
        if top not in roots:
            libraries.add(top)
            continue
        imported = {parent} - {""}
        for ending in ("/__init__.py", ".py"):  # neither exists for the name of a definition
            file = name.replace(".", "/") + ending
            if (roots[top] / file).is_file():
                tree = ast.parse(STAND_INS.get(name) or (roots[top] / file).read_text("utf-8"))
                modules[name] = file, tree
                imported |= set(_imported(tree))
        waiting |= imported - modules.keys()
    return dict(sorted(modules.items())), tuple(sorted(libraries - sys.stdlib_module_names))


def _imported(tree: ast.Module) -> Iterator[str]:
    """The names in the import statements of `tree`: modules, and definitions in modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def minify(tree: ast.Module) -> str:
    """The source of `tree` without docstrings, comments and annotations of functions, with short
    local names. Changes `tree`.
    """
    source = ast.unparse(ast.fix_missing_locations(_Portable().visit(tree)))
    # The compressor finds repeated literals, for less than names in their place would take.
    return python_minifier.minify(source, remove_literal_statements=True, hoist_literals=False)


class _Portable(ast.NodeTransformer):
    """Turns f-strings into calls of `str.join` and `format`. From Python 3.12 on, the printers may
    give a string inside an f-string the quotes of the f-string, which Python 3.11 cannot read.
    """

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        self.generic_visit(node)
        join = ast.Attribute(ast.Constant(""), "join", ast.Load())
        parts = node.values
        return parts[0] if len(parts) == 1 else ast.Call(join, [ast.List(parts, ast.Load())], [])

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.expr:
        self.generic_visit(node)
        arguments = [node.value, node.format_spec] if node.format_spec else [node.value]
        if node.conversion >= 0:
            converter = ast.Name({"r": "repr", "s": "str", "a": "ascii"}[chr(node.conversion)])
            arguments[0] = ast.Call(converter, arguments[:1], [])
        return ast.Call(ast.Name("format"), arguments, [])


def run(
    bundle: Path,
    artifact: Path,
    data: Path | None = None,
    tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What the program says of `artifact`: its contents, and with `data` its score on the first
    `tokens` (0: all) validation tokens there.

    The program runs in its own process, in an empty folder, without this process's import path.
    `progress(done, total)` counts rows of windows. Raises `UserError` with the program's last line
    if the program fails.
    """
    command = [sys.executable, "-I", str(bundle.absolute()), str(artifact.absolute()), "--json"]
    if data:
        command += ["--data", str(data.absolute()), "--tokens", str(tokens)]
    # this process may hold most of an accelerator's memory, so the program takes what it needs
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not data:
        environment["JAX_PLATFORMS"] = "cpu"  # the program computes nothing
    # the result goes to a file, because a full pipe would block the program
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=empty, env=environment, stdout=output, stderr=subprocess.PIPE, text=True
        )
        line = ""
        try:
            for line in process.stderr or ():
                if progress and (rows := _ROWS.match(line)):
                    progress(int(rows[1]), int(rows[2]))
                else:
                    logger.info("%s: %s", bundle.name, line.rstrip())
            status = process.wait()
        finally:
            process.kill()  # for an interrupted export; does nothing after the program's end
        if status:
            said = line.strip().removeprefix("error: ") or f"exit status {status}"
            raise UserError(f"{bundle.name}: the exported program fails: {said}")
        output.seek(0)
        result: dict[str, Any] = json.load(output)
    return result
