"""The how-tos as a reader follows them, each in its own copy of the tree: patches apply, files are
saved, commands succeed.
"""

import shutil

import pytest

from tests.docs.followed import ROOT, follow

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path):
    """A copy of what the how-tos change and run."""
    copy = tmp_path / "tree"
    for name in ("sngpt_jax", "kernels", "configs", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_a_technique(tree):
    tested, planned = follow(ROOT / "docs/howto_technique.md", tree, tree)[0].split(
        "parameters ", 1
    )
    assert " passed" in tested and "failed" not in tested
    assert "blocks/*/attn/head_scale" in planned


def test_a_recipe(tree):
    tried, shown = follow(ROOT / "docs/howto_recipe.md", tree, tree)
    assert "parameters   1,019,276 " in tried and "parameters   1,019,276 " in shown
    assert (tree / "runs/quickstart_6l/summary.json").exists()
    assert " passed" in shown and "failed" not in shown


def test_a_kernel(tree):
    (printed,) = follow(ROOT / "docs/howto_kernel.md", tree, tree)
    assert "5 passed" in printed
    assert "| relu2 quickstart | forward + backward | xla | " in printed
    assert "| relu2 quickstart | forward | pallas_triton | cannot serve |" in printed
