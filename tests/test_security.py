"""No data is ever run: by the source of every module, and while the commands read files."""

import _pickle
import ast
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.data import golf, shards
from sngpt_jax.data.manifest import verify
from sngpt_jax.data.shards import open_dataset
from tests import fuzz, tiny_run

ROOT = Path(__file__).parents[1]
SOURCES = [path for package in ("sngpt_jax", "kernels") for path in (ROOT / package).rglob("*.py")]

# Modules that make code or objects from data, or run text as a command.
RUNNING = """pickle _pickle cPickle pickletools marshal shelve dbm dill cloudpickle joblib copyreg
yaml ruamel runpy imp code codeop pty commands jsonpickle xmlrpc builtins"""
MODULES = set(RUNNING.split())
BUILTINS = {"eval", "exec", "compile", "__import__", "input", "execfile"}
CALLING = """importlib.import_module importlib.__import__ importlib.reload os.system os.popen
importlib.util.spec_from_file_location subprocess.getoutput subprocess.getstatusoutput
tempfile.mktemp asyncio.create_subprocess_shell pandas.read_pickle"""
CALLS = set(CALLING.split())
# Functions of libraries that unpickle unless an option says otherwise.
OPTIONS = dict.fromkeys(("numpy.load", "numpy.lib.format.read_array"), ("allow_pickle", False))
OPTIONS |= {"torch.load": ("weights_only", True)}
# code in a string, which something may run
TEXT = re.compile(r"\b(eval|exec|compile|__import__)\(")
RISKS = {"shell", "allow_pickle", "trust_remote_code"}  # options that are to be False
LATE = "importlib.import_module"

# Each with its reason. What is here and not found any more is an error too.
EXCEPTIONS = {
    "sngpt_jax/config/recipe.py": ("import runpy", "recipes are code, of the user's own"),
    "sngpt_jax/weights/state_dict_files.py": ("import pickle", "names the error of torch.load"),
    "sngpt_jax/data/corpus/hub.py": (LATE, "optional packages that the source names"),
    "sngpt_jax/artifact/bundle.py": ("code in a string", "the exported program runs its own file"),
    "kernels/sngpt_kernels/dispatch.py": (LATE, "a backend that the source names"),
    "sngpt_jax/ahead/cases.py": (LATE, "operations that are folders of the source"),
    "sngpt_jax/bench/__main__.py": (LATE, "benchmarks that the source lists"),
    "sngpt_jax/bench/first_light_parts.py": (LATE, "operations that the package lists"),
    "sngpt_jax/bench/tune.py": (LATE, "operations that the command line lists"),
}


def imported(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Of every import in a module: the module it names, the name it binds, and what that means."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.name, alias.asname or top, alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` as text, with the meaning of `a`; "" for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    inner = dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def dangers(tree: ast.Module) -> Iterator[str]:
    """What a module does that could run data."""
    names = {}
    for module, bound, target in imported(tree):
        names[bound] = target
        if module.partition(".")[0] in MODULES:
            yield f"import {module}"
    nodes = list(ast.walk(tree))
    kinds = ast.Module | ast.FunctionDef | ast.ClassDef
    firsts = (node.body[0] for node in nodes if isinstance(node, kinds) and node.body)
    docstrings = {id(first.value) for first in firsts if isinstance(first, ast.Expr)}
    set_right = {  # functions that are called with the option that they need
        id(call.func)
        for call in nodes
        if isinstance(call, ast.Call)
        for word in call.keywords
        if isinstance(word.value, ast.Constant)
        and OPTIONS.get(dotted(call.func, names)) == (word.arg, word.value.value)
    }
    for node in nodes:
        if isinstance(node, ast.Constant):
            text = node.value if isinstance(node.value, str) and id(node) not in docstrings else ""
            if TEXT.search(text):
                yield "code in a string"
        # called, or passed on
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            what = dotted(node, names)
            if what in BUILTINS | CALLS or re.fullmatch(r"os\.(exec|spawn)\w+", what):
                yield what
            elif what in OPTIONS and id(node) not in set_right:
                yield "{} without {}={}".format(what, *OPTIONS[what])
        elif (
            isinstance(node, ast.keyword)
            and node.arg in RISKS
            and getattr(node.value, "value", None) is not False
        ):
            yield f"{node.arg}="


def test_no_module_runs_data():
    assert len(SOURCES) > 100
    found = {
        (path.relative_to(ROOT).as_posix(), danger)
        for path in SOURCES
        for danger in dangers(ast.parse(path.read_text("utf-8")))
    }
    assert found == {(path, danger) for path, (danger, _) in EXCEPTIONS.items()}


NUMPY, TORCH = "numpy.load without allow_pickle=False", "torch.load without weights_only=True"


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "import pickle"),
        ("def f():\n    from dill import loads", "import dill"),
        ("import joblib.externals as x", "import joblib.externals"),
        ("import yaml\nyaml.load(x)", "import yaml"),
        ("def f(x):\n    return eval(x)", "eval"),
        ("run = exec", "exec"),
        ("compile(x, '', 'exec')", "compile"),
        ("__import__(x)", "__import__"),
        ("import importlib as i\ni.import_module(x)", "importlib.import_module"),
        ("from importlib import import_module as m\nm(x)", "importlib.import_module"),
        ("import numpy\nnumpy.load(x)", NUMPY),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", NUMPY),
        ("from numpy import load\nload(x)", NUMPY),
        ("import numpy as np\nf = np.load", NUMPY),
        ("import torch\ntorch.load(x)", TORCH),
        ("import torch\ntorch.load(x, weights_only=safe)", TORCH),
        ("g(x, allow_pickle=p)", "allow_pickle="),
        ("import subprocess\nsubprocess.run(x, shell=True)", "shell="),
        ("import os\nos.system(x)", "os.system"),
        ("from os import execvp\nexecvp(x, y)", "os.execvp"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("load_dataset(x, trust_remote_code=True)", "trust_remote_code="),
        ("x = 'exec(y)'", "code in a string"),
    ],
)
def test_what_the_search_finds(source, danger):
    assert danger in dangers(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(x)",
        "lowered.compile(compiler_options=x)",
        "import numpy as np\nnp.load(x, allow_pickle=False)",
        "import torch\ntorch.load(x, weights_only=True)",
        "import subprocess\nsubprocess.run([x], shell=False)",
        "import importlib.util\nimportlib.util.find_spec(x)",
        '"""Never calls eval(x)."""',
    ],
)
def test_what_the_search_leaves(source):
    assert not list(dangers(ast.parse(source)))


# ---------------------------------------- seen while files are read


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return {kind.name: kind for kind in fuzz.make_formats(tmp_path_factory.mktemp("formats"))}


class Refused:
    """In place of pickle's functions; a class, since libraries derive from some of them."""

    def __init__(self, *arguments: object, **options: object) -> None:
        raise AssertionError("something is unpickled")


def test_no_reader_unpickles(formats, monkeypatch):
    """Data, runs, checkpoints through orbax, tokenizers, artifacts, npz and safetensors."""
    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, Refused)
    with pytest.raises(AssertionError, match="is unpickled"):
        pickle.loads(b"N.")
    for kind in formats.values():
        kind.read()


POISON = """
import sys, pickle, _pickle, runpy
class Refused:
    def __init__(self, *arguments, **options):
        raise AssertionError("something is unpickled")
for module in (pickle, _pickle):
    for name in ("load", "loads", "Unpickler"):
        setattr(module, name, Refused)
def watch(event, arguments):
    if event == "pickle.find_class":
        raise AssertionError("something is unpickled")
sys.addaudithook(watch)
target, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = target
run = runpy.run_path if target.endswith(("pyz", "py")) else runpy.run_module
run(target, run_name="__main__")
"""


def poisoned(target: object, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", POISON, str(target), *map(str, arguments)]
    options = {"cwd": ROOT, "env": tiny_run.environment(), "timeout": 300}
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_no_command_unpickles(tiny_trained, tmp_path):
    model, data = tmp_path / "model.sngpt", tiny_trained.parent / "data"
    evil = tmp_path / "evil.py"
    evil.write_text("import pickle; pickle.loads(pickle.dumps(print))")
    assert "something is unpickled" in poisoned(evil).stderr
    run, some = ("--run", tiny_trained), ("--data", data, "--tokens", 2048)
    for target, *arguments in [
        ("sngpt_jax.evaluate", *run, *some),
        ("sngpt_jax.export", *run, "--out", model, *some),
        ("sngpt_jax.evaluate", "--artifact", model, *some),
        ("sngpt_jax.sample", "--artifact", model, "--prompt", "a", "--max-tokens", 4),
        (model.with_suffix(".pyz"), model, *some),
    ]:
        done = poisoned(target, *arguments)
        assert done.returncode == 0, (target, done.stderr)


# ---------------------------------------- names in files


# tests/base/test_untrusted.py has every other such name
@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..\\x", ""])
@pytest.mark.parametrize(
    "kind", ["manifest.json", "progress.json", "checkpoint record", "published manifest"]
)
def test_names_in_files_stay_in_their_folder(kind, name, formats, monkeypatch):
    if kind == "published manifest":
        with pytest.raises(UserError, match="names"):
            download_named(name, monkeypatch)
        return
    target = formats[kind].target
    whole = target.read_text()
    values = json.loads(whole)
    message = "expected a plain file name"
    if kind == "checkpoint record":
        values["record"]["files"], message = {name: "0" * 64}, "names the file"
        record = json.dumps(values["record"], sort_keys=True)
        values["sha256"] = hashlib.sha256(record.encode()).hexdigest()
    else:
        entries = values["train"] if kind == "manifest.json" else values["train"]["shards"]
        entries[0]["name"] = name
    target.write_text(json.dumps(values))
    try:
        with pytest.raises(UserError, match=message):
            formats[kind].read()
    finally:
        target.write_text(whole)


def download_named(name, monkeypatch):
    """As if the published data set's manifest named its tokenizer so."""
    hub = types.SimpleNamespace(hf_hub_download=lambda *arguments, **options: __file__)
    monkeypatch.setattr(golf, "imported", lambda *arguments: hub)
    monkeypatch.setattr(golf, "_entry", lambda *arguments: ("x", name, {"train": 1, "val": 1}))
    with tempfile.TemporaryDirectory() as folder:
        golf.download(Path(folder), vocab_size=1024, train_shards=1)


@pytest.mark.parametrize("kind", ["shard", "tokenizer"])
def test_a_link_in_a_folder_of_tokens_does_not_lead_out(kind, formats, tmp_path, monkeypatch):
    # as of a large data set, whose checksums are left alone
    monkeypatch.setattr(shards, "_VERIFIED_BYTES", 0)
    folder = tmp_path / "data"
    shutil.copytree(formats["manifest.json"].target.parent, folder)
    name = "train_000000.bin" if kind == "shard" else "tokenizer.model"
    assert open_dataset(folder, 320)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    for read in (lambda: open_dataset(folder, 320), lambda: verify(folder)):
        with pytest.raises(UserError, match=f"{name}: a link that leads out of"):
            read()
