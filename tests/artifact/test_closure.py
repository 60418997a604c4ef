"""What a module needs of its project: the oracle is Python, which runs what was kept."""

import ast
import subprocess
import sys

import pytest

from sngpt_jax.artifact.closure import closure

FILES = {
    "app/__init__.py": (
        '''
"""A package whose own names come from a module."""
from .names import TITLE as title
from app.unused import nothing
'''
    ),
    "app/names.py": "TITLE, SUBTITLE = 'app', 'b'\nOTHER = 1\n",
    "app/unused.py": (
        "print('app.unused is imported')\n\ndef nothing(): pass\n\nclass Unknown: pass\n"
    ),
    "app/main.py": (
        """
from __future__ import annotations
import sys as system
import app.deep.leaf as leaf
import extra.tools
from . import sibling
from .deep import inner, CONSTANT
from app.conditional import value
from app import title

def later() -> int:
    from .deep.late import answer
    return answer()

if __name__ == "__main__":
    print(leaf.name(), extra.tools.twice(2), sibling.which(), inner.depth, CONSTANT, value, title, later())
"""
    ),
    "app/sibling.py": (
        """
from .deep import leaf as _leaf
from app.unused import Unknown
import numpy as np
import tokenizers

HANDLERS = {}
def which(kind: Unknown = None, *rest: Unknown, **more: Unknown) -> Unknown:
    found: Unknown = getattr(_leaf, "by_string")
    return found()

def unused():
    import app.unused
    return np.zeros(1)
"""
    ),
    "app/conditional.py": (
        """
try:
    from app.deep.chosen import first as value
except ImportError:
    from app.deep.fallback import second as value
"""
    ),
    "app/deep/__init__.py": "CONSTANT = [len(word) for word in ('ab', 'c')]\nPRIVATE = 1\n",
    "app/deep/inner.py": "from dataclasses import dataclass\ndepth = 2\nshallow = 3\n",
    "app/deep/leaf.py": (
        """
def _helper(): return 'leaf'
def name(): return _helper()
def by_string(): return 'by string'
def not_named(): return 1
"""
    ),
    "app/deep/late.py": "from ..names import OTHER\n\ndef answer(): return OTHER + 41\n",
    "app/deep/chosen.py": "first = 'first'\n",
    "app/deep/fallback.py": "second = 'second'\n",
    "app/deep/never.py": "1 / 0\n",
    "extra/__init__.py": "",
    "extra/tools.py": (
        """
from dataclasses import dataclass
from typing import NamedTuple
from app.unused import Unknown

@dataclass
class Pair:
    first: int
    second: 'int' = 2

    def total(self, more: Unknown = 0) -> Unknown:
        result: Unknown = self.first * self.second
        return result + more

class Triple(NamedTuple):
    x: int
    y: int

def twice(n):
    return Pair(n).total(), Triple(1, y=n)
"""
    ),
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def kept(found, module):
    return ast.unparse(found.modules[module])


def test_modules_and_definitions(tree):
    found = closure("app.main", tree, ["app", "extra"])
    deep = ("deep", "deep.chosen", "deep.fallback", "deep.inner", "deep.late", "deep.leaf")
    assert sorted(found.modules) == sorted(
        ["app", "app.main", "app.sibling", "app.conditional", "app.names", "extra", "extra.tools"]
        + [f"app.{m}" for m in deep]
    )
    assert found.packages == {"app", "app.deep", "extra"}
    assert found.libraries == ()  # only what is not needed imports some
    assert kept(found, "app.deep.leaf").count("def ") == 3 and "not_named" not in kept(
        found, "app.deep.leaf"
    )
    assert kept(found, "app") == "from .names import TITLE as title"
    assert kept(found, "app.deep.inner") == "depth = 2"
    assert kept(found, "app.deep.chosen") == "first = 'first'"
    assert "unused" not in kept(found, "app.sibling")
    assert "PRIVATE" not in kept(found, "app.deep")
    assert "Unknown" not in kept(found, "app.sibling") + kept(found, "extra.tools")
    assert "first: int" in kept(found, "extra.tools")


def test_what_is_kept_runs_as_the_whole_does(tree, tmp_path):
    found = closure("app.main", tree, ["app", "extra"])
    for name, module in found.modules.items():
        path = (
            tmp_path
            / "cut"
            / (name.replace(".", "/") + ("/__init__.py" if name in found.packages else ".py"))
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ast.unparse(module))

    def output(folder):
        done = subprocess.run(
            [sys.executable, "-m", "app.main"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.replace("app.unused is imported\n", "")

    assert (
        output(tmp_path / "cut")
        == output(tree)
        == "leaf (4, Triple(x=1, y=2)) by string 2 [2, 1] first app 42\n"
    )


def test_libraries_of_what_is_needed(tree):
    (tree / "app/sibling.py").write_text(
        FILES["app/sibling.py"].replace("return found()", "return np.array, found()")
    )
    assert closure("app.main", tree, ["app", "extra"]).libraries == ("numpy",)
    assert closure("app.main", tree, ["app"]).libraries == ("extra", "numpy")


def test_what_cannot_be_followed_is_said(tree):
    (tree / "app/sibling.py").write_text("from app.gone import which\n")
    with pytest.raises(ModuleNotFoundError, match=r"app\.gone is imported, and not in "):
        closure("app.main", tree, ["app", "extra"])
    (tree / "app/sibling.py").write_text("from app.names import *\ndef which(): return TITLE\n")
    with pytest.raises(
        ValueError, match=r"app\.sibling: from app\.names import \* hides what it needs"
    ):
        closure("app.main", tree, ["app", "extra"])
