"""The program that decodes and scores an artifact, as one file: `python model.pyz model.sngpt
--data DIR`.

The program holds whole modules: `sngpt_jax.score_artifact` and every module of the project that it
imports, directly or through others. They are minified and compressed together. A zip archive with
one line of code follows the compressed stream: Python runs a zip's `__main__.py`, and a zip may
begin with other bytes. The program therefore takes its compressed bytes and about 200 more. As text
in a .py file it would take a quarter more. An importer serves the modules from memory, ahead of
installed modules with equal names. The program does not contain libraries.
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
# Modules that the program does not need although others import them, and the source in their place.
STAND_INS = {
    # the exporter has validated the configuration that the artifact holds
    "sngpt_jax.config.checks": "def validate(config): return config",
    # the program draws no progress bars, which need rich
    "sngpt_jax.base.terminal": "def clear(): pass",
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
        exec(compile(self.sources.get(name) or self.sources.get(name + ".", ""), name, "exec"), module.__dict__)
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
    # path of each source file, and its bytes after minifying, before compression
    files: tuple[tuple[str, int], ...]
    libraries: tuple[str, ...]  # top-level names of the libraries that it imports


def build(entry: str = ENTRY, project: Sequence[str] = PROJECT) -> Bundle:
    """The program that runs module `entry` of the top-level packages `project`, as `python -m`
    does.

    Equal sources give equal bytes. The program runs on every version of Python that its sources
    run on.
    """
    modules, libraries = _needed(entry, project)
    sources = {name: minify(tree) for name, (_, tree) in modules.items()}
    packages = {name for name, (path, _) in modules.items() if path.name == "__init__.py"}
    parts = [minify(ast.parse(_IMPORTER)), entry.rpartition(".")[0], sources[entry]]
    for name, source in sources.items():
        if name != entry:
            parts += [name + "." * (name in packages), source]
    files = (
        (
            name.replace(".", "/") + ("/__init__.py" if name in packages else ".py"),
            len(source.encode()),
        )
        for name, source in sources.items()
    )
    return Bundle(_pack("\0".join(parts).encode()), tuple(files), tuple(sorted(libraries)))


def _needed(
    entry: str, project: Sequence[str]
) -> tuple[dict[str, tuple[Path, ast.Module]], set[str]]:
    """The file and the source of each module of the project that `entry` imports, at its top or in
    a function, directly or through others, sorted by name; and the libraries that they import.
    """
    folders = {top: Path(_folder(top)) for top in project}
    modules: dict[str, tuple[Path, ast.Module]] = {}
    libraries: set[str] = set()
    waiting = {entry}
    while waiting:
        name = waiting.pop()
        top, *rest = name.split(".")
        if top not in folders:
            libraries.add(top)
            continue
        module = folders[top].joinpath(*rest)
        imported = {name.rpartition(".")[0]} if rest else set()
        # where neither is a file, the name is one of a module's definitions
        for path in filter(Path.is_file, (module / "__init__.py", module.with_suffix(".py"))):
            tree = ast.parse(STAND_INS.get(name) or path.read_text(encoding="utf-8"))
            modules[name] = path, tree
            imported |= set(_imported(tree))
        waiting |= imported - modules.keys()
    return dict(sorted(modules.items())), libraries - sys.stdlib_module_names


def _folder(package: str) -> str:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is not installed", name=package)
    return spec.submodule_search_locations[0]


def _imported(tree: ast.Module) -> Iterator[str]:
    """What the import statements of `tree` name: modules, and names in modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def minify(tree: ast.Module) -> str:
    """The source of `tree` without docstrings and comments, with short names for what is local.
    Changes `tree`.
    """
    tree = ast.fix_missing_locations(_Portable().visit(tree))
    # literals stay where they are: the compressor finds repeated ones, for less than the names
    # that would stand for them
    return python_minifier.minify(
        ast.unparse(tree), remove_literal_statements=True, hoist_literals=False
    )


class _Portable(ast.NodeTransformer):
    """Makes calls of `str.format` of f-strings with strings in their fields: from 3.12 on,
    Python's own and the minifier's printers give those the same quotes as the f-string, which 3.11
    does not read."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        fields = list(_fields(node))
        for field in fields:
            field.value = self.visit(field.value)
        inside = (part for field in fields for part in ast.walk(field.value))
        if not any(
            isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str | bytes)
            for part in inside
        ):
            return node
        template = ast.Constant(_template(node))
        return ast.Call(
            ast.Attribute(template, "format", ast.Load()), [field.value for field in fields], []
        )


def _fields(node: ast.JoinedStr) -> Iterator[ast.FormattedValue]:
    """The fields of an f-string in the order that `str.format` counts them in: those of a field's
    own format follow it.
    """
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            yield part
            if isinstance(part.format_spec, ast.JoinedStr):
                yield from _fields(part.format_spec)


def _template(node: ast.JoinedStr) -> str:
    """What `str.format` takes for an f-string."""
    text = ""
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            conversion = f"!{chr(part.conversion)}" if part.conversion >= 0 else ""
            spec = (
                f":{_template(part.format_spec)}"
                if isinstance(part.format_spec, ast.JoinedStr)
                else ""
            )
            text += "{" + conversion + spec + "}"
        elif isinstance(part, ast.Constant):
            text += str(part.value).replace("{", "{{").replace("}", "}}")
    return text


def _pack(text: bytes) -> bytes:
    # bz2 compresses the 128 kB of minified source to about 38 kB; lzma needs 2 % more
    code = bz2.compress(text)
    file = io.BytesIO()
    file.write(code)
    with zipfile.ZipFile(file, "a") as archive:  # stored: one line does not compress
        # ZipInfo's date is always 1980-01-01
        archive.writestr(zipfile.ZipInfo("__main__.py"), _MAIN.format(size=len(code)))
    return file.getvalue()


def run(
    bundle: Path,
    artifact: Path,
    data: Path | None = None,
    tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What the bundle finds in `artifact`, and its score on the first `tokens` (0: all) validation
    tokens of `data`.

    Runs in a process of its own, in an empty folder, without this process's import path. Raises
    `UserError` with the last line that it wrote where it fails. `progress(done, total)` is told of
    rows of windows as it scores them.
    """
    command = [sys.executable, "-I", str(bundle.absolute()), str(artifact.absolute()), "--json"]
    if data:
        command += ["--data", str(data.absolute()), "--tokens", str(tokens)]
    # this process may hold most of an accelerator's memory: the other one is to take no more than
    # it needs
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not data:
        environment["JAX_PLATFORMS"] = "cpu"  # nothing is to be computed
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as output:
        # its result goes to a file, so that no pipe can fill up while its progress is passed on
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
            # does nothing to one that has ended; an interrupted export leaves none behind
            process.kill()
        if status:
            said = line.strip().removeprefix("error: ") or f"exit status {status}"
            raise UserError(f"{bundle.name}: fails when it is run alone: {said}")
        output.seek(0)
        result: dict[str, Any] = json.load(output)
    return result
