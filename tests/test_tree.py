"""Properties of the whole tree: docstrings, places of tests, light imports, quick `--help`.

`.ci/house` measures sizes.
"""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "sngpt_jax", ROOT / "kernels/sngpt_kernels"]
MODULES = sorted(path for folder in [*PACKAGES, ROOT / "configs"] for path in folder.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
COMMANDS = sorted(
    [path.stem for path in (ROOT / "sngpt_jax").glob("*.py") if path.stem != "__init__"]
    + [path.parent.name for path in (ROOT / "sngpt_jax").glob("*/__main__.py")]
)

# Folders of tests of no single package
OF_THEIR_OWN = {
    "docs": "what the documentation says",
    "deviceless": "programs for GPUs that are not here",
    "faults": "runs that are broken on purpose",
    "published": "what the published scripts computed",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_tree_is_found():
    assert len(MODULES) > 100 and len(TESTS) > 70 and len(COMMANDS) >= 11


def test_no_page_part_is_too_long_to_read():
    """`.ci/house` measures Python files."""
    parts = [path for path in (ROOT / "sngpt_jax").rglob("*") if path.suffix in (".js", ".css")]
    lines = {path.name: path.read_text().count("\n") for path in parts}
    assert lines and {name: count for name, count in lines.items() if count > 400} == {}


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
    """Every module; in the packages every function and class, but commands' main and options."""
    found = {relative(path): unexplained(path) for path in [*MODULES, *TESTS]}
    assert {name: silent for name, silent in found.items() if silent} == {}


def test_tests_stand_where_what_they_test_does():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS} - {"."}
    packages = {
        path.parent.relative_to(ROOT / "sngpt_jax").as_posix()
        for path in (ROOT / "sngpt_jax").rglob("*.py")
    }
    assert folders - packages - {"kernels", "kernels/trials"} - set(OF_THEIR_OWN) == set()


LIGHT = (
    "sngpt_jax.config.recipe",
    "sngpt_jax.config.file",
    "sngpt_jax.prepare",
    "sngpt_jax.data.prepared",
    "sngpt_jax.artifact.sngpt_file",
    "sngpt_jax.artifact.bundle",
    "sngpt_jax.report.page",
    "sngpt_kernels.cayley.dictionary",
)


def test_configuration_preparation_and_artifacts_import_no_jax():
    """Not even by a package's `__init__`, which the contracts on imports do not follow."""
    imports = "; ".join(f"import {name}" for name in LIGHT)
    heavy = "{'jax', 'flax', 'optax', 'orbax', 'torch'}"
    check = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True) == "[]\n"


def test_training_and_bench_import_neither_pyarrow_nor_tokenizers():
    """A machine for measurements need not have them."""
    imports = "import sngpt_jax.training.trainer, sngpt_jax.bench.step, sngpt_jax.bench.kernels"
    check = f"import sys; {imports}; print({{'pyarrow', 'tokenizers'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True) == "set()\n"


def cpu_seconds(*command: str) -> float:
    """User and system seconds of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_little_time(command):
    """Under 1 s of CPU time, or 1.5 times what numpy and tyro take; the best of two runs counts."""
    limit = max(1.0, 1.5 * cpu_seconds("-c", "import numpy, tyro"))
    runs = (cpu_seconds("-m", f"sngpt_jax.{command}", "--help") for _ in range(2))
    assert any(seconds < limit for seconds in runs)
