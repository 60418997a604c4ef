"""What holds of the tree as a whole: the size of its files, what is explained, where tests stand,
and what needs no jax.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "sngpt_jax", ROOT / "kernels"]
MODULES = sorted(path for folder in [*PACKAGES, ROOT / "configs"] for path in folder.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
WRITTEN = [
    path
    for folder in PACKAGES
    for path in folder.rglob("*")
    if path.suffix in (".py", ".html", ".js", ".css")
]

# Folders of tests of no single package
OF_THEIR_OWN = {
    "docs": "what the documentation says",
    "deviceless": "programs for GPUs that are not here",
    "faults": "runs that are broken on purpose",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_tree_is_found():
    assert len(MODULES) > 100 and len(TESTS) > 70 and len(WRITTEN) > 100


def test_no_file_is_too_long_to_read():
    """A module is asking to be two at 400 lines, a file of tests at 550."""
    lines = {relative(path): path.read_text().count("\n") for path in [*MODULES, *WRITTEN, *TESTS]}
    assert {
        name: count
        for name, count in lines.items()
        if count > (550 if name.startswith("tests/") else 400)
    } == {}


def unexplained(path: Path) -> list[str]:
    module = ast.parse(path.read_text())
    silent = [] if ast.get_docstring(module) or not module.body else ["the module"]
    if path in TESTS:
        return silent
    return silent + [
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not ast.get_docstring(node)
        if not node.name.startswith("_")
        and node.name != "main"
        and not node.name.endswith("Arguments")
    ]


def test_what_is_public_is_explained():
    """Every module; in the packages every function and class too, but for a command's `main` and
    its options, which the module's docstring and the options' own texts explain.
    """
    found = {relative(path): unexplained(path) for path in [*MODULES, *TESTS]}
    assert {name: silent for name, silent in found.items() if silent} == {}


def test_tests_stand_where_what_they_test_does():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS} - {"."}
    packages = {
        path.parent.relative_to(ROOT / "sngpt_jax").as_posix()
        for path in (ROOT / "sngpt_jax").rglob("*.py")
    }
    assert folders - packages - {"kernels"} - set(OF_THEIR_OWN) == set()


def test_preparation_and_decoding_import_no_jax():
    """Not even by way of a package's `__init__`, which the contracts on imports do not follow."""
    names = ("config", "data.recipe", "data.prepare", "export.artifact", "export.bundle")
    imports = "; ".join(f"import sngpt_jax.{name}" for name in names)
    check = (
        f"import sys; {imports}; print(sorted(m for m in ('jax', 'flax', 'optax', 'orbax') if m in"
        " sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
