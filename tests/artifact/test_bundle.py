"""The program of an export runs from its own modules alone, and scores as the project does."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import asdict, replace

import numpy as np
import pytest

from sngpt_jax.artifact import bundle
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import leaves_by_path, make_mesh
from sngpt_jax.config import Config, ExportConfig, ModelConfig, parse_levels
from sngpt_jax.config.recipe import load
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.model.forward import abstract_variables
from sngpt_jax.weights.trained_model import from_artifact
from tests import golf_oracle, tiny_run

ENTRY = '''
"""Docstring."""
import json, sys
from app.parts import Shape, area
from app import parts as renamed

def main():
    import app.late
    shape = Shape(int(sys.argv[1]), 3)  # comment
    names = [name for name in sys.modules if name.split(".")[0] == "app"]
    found = {"area": area(shape, verbose=True), "late": app.late.value, "text": renamed.TEXT}
    print(json.dumps({**found, "names": sorted(names)}))

if __name__ == "__main__":
    main()
'''
PARTS = '''
from dataclasses import dataclass

TEXT = "naïve ▁ \\\\ \\n 'quoted' \\0"

@dataclass
class Shape:
    """Docstring."""
    width: int
    height: int = 2

    @property
    def corners(self) -> int:
        return 4

def area(shape: Shape, *, verbose: bool = False) -> int:
    """Docstring."""
    number_of_corners = shape.corners
    assert verbose and number_of_corners == 4
    return shape.width * shape.height
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The folder of a package `app`, from which it can be imported."""
    monkeypatch.syspath_prepend(tmp_path / "tree")
    folder = tmp_path / "tree" / "app"
    folder.mkdir(parents=True)
    files = {"__init__": "version = '1'", "main": ENTRY, "parts": PARTS, "late": "value = 5"}
    for name, text in {**files, "absent": "value = 6"}.items():
        (folder / f"{name}.py").write_text(text)
    return folder.parent


def execute(data, tmp_path, *arguments, options=(), **environment):
    """The finished process of a bundle's bytes, run in an empty folder, which stays empty."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    (tmp_path / "model.pyz").write_bytes(data)
    done = subprocess.run(
        [sys.executable, *options, tmp_path / "model.pyz", *map(str, arguments)],
        cwd=tmp_path / "empty",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert not list((tmp_path / "empty").iterdir())
    return done


def test_runs_as_the_source_does(tree, tmp_path):
    built = bundle.build("app.main", ["app"])
    done = execute(built.data, tmp_path, 7, options=["-I"])
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "app.main", "7"]
    assert done.stdout == subprocess.check_output(command, cwd=tree, text=True)
    assert json.loads(done.stdout)["names"] == ["app", "app.late", "app.parts"]


def test_only_its_own_modules_serve(tree, tmp_path):
    """An installed package of the same name neither takes their place nor adds to them."""
    built = bundle.build("app.main", ["app"])
    (tree / "app/parts.py").write_text("raise RuntimeError('the installed package was imported')\n")
    done = execute(built.data, tmp_path, 7, PYTHONPATH=str(tree))
    assert done.returncode == 0, done.stderr

    (tree / "app/main.py").write_text(
        "import importlib\nimportlib.import_module('app.' + 'absent')"
    )
    done = execute(bundle.build("app.main", ["app"]).data, tmp_path, PYTHONPATH=str(tree))
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'app.absent'"


def test_equal_sources_give_equal_bytes(tree):
    first = bundle.build("app.main", ["app"])
    sizes = dict(first.files)
    assert list(sizes) == [f"app/{name}.py" for name in ("__init__", "late", "main", "parts")]
    assert sizes["app/__init__.py"] == len("version='1'") and sizes["app/late.py"] == len("value=5")
    assert 0 < sizes["app/parts.py"] < len(PARTS.encode())
    assert first.libraries == ()
    os.utime(tree / "app/parts.py", (0, 0))
    assert bundle.build("app.main", ["app"]) == first
    (tree / "app/parts.py").write_text(PARTS.replace("return 4", "return 3"))
    assert bundle.build("app.main", ["app"]).data != first.data


@pytest.mark.parametrize(
    "text",
    [
        """f"{', '.join(['a'])!r:>{w}} {{braces}} {n:,} {n + 1:0{w}.{p}f} {'x'}\\n{f'{n}'}" """,
        """f'{d["key"]}' f"{w=}" "{}" """,
        """f"{f'{w!s:^{p + 3}}'}" """,
        """f"{n:,} {w!r} {n:}" """,
    ],
)
def test_formatted_strings_are_read_by_every_python(text):
    """There are none left, because Python 3.11 does not read those of Python 3.12."""
    small = bundle.minify(ast.parse(f"x = {text.strip()}"))
    values = {"n": 12345, "w": 9, "p": 2, "d": {"key": "value"}}
    found = dict(values)
    exec(small, found)
    assert found["x"] == eval(text.strip(), values)
    assert not any(isinstance(node, ast.JoinedStr) for node in ast.walk(ast.parse(small)))


def test_a_failure_is_one_line(tree, tmp_path):
    (tmp_path / "model.pyz").write_bytes(bundle.build("app.main", ["app"]).data)
    said = "^model.pyz: the exported program fails: ValueError: invalid literal.*$"
    with pytest.raises(UserError, match=said):
        bundle.run(tmp_path / "model.pyz", tmp_path / "no.sngpt")


# ------------------------------------------------------------------------------ the project's own


def metadata(config):
    of_run = {"step": 20, "weights": "ema", "version": "0"}
    return {"config": config, "tokenizer": None, **of_run}


@pytest.fixture(scope="module")
def built():
    return bundle.build()


@pytest.mark.slow
def test_the_programs_files(built):
    """What trains, writes or asks is not in it."""
    names = {name for name, _ in built.files}
    assert {"sngpt_jax/score_artifact.py", "sngpt_kernels/cayley/xla.py"} <= names
    unneeded = ("training/", "optim/", "run/", "config/recipe", "cayley/pallas", "xsa/pallas")
    assert not [name for name in names if any(part in name for part in unneeded)]
    libraries = "chex constriction flax jax numpy optax sentencepiece tokenizers zstandard"
    assert built.libraries == tuple(libraries.split())
    assert len(built.data) < 46_500, "it counts towards the limit"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.sngpt"], "no.sngpt: cannot be read"),
        (["no.sngpt", "--tokens", -1], "--tokens -1 is negative; 0 scores the whole stream"),
        (["hostile.sngpt"], "model.d_model = 32 is not divisible by model.num_heads = 3"),
    ],
)
def test_mistakes_are_one_line(built, tmp_path, arguments, said):
    """The program checks an artifact's configuration as every command does."""
    config = asdict(Config(replace(COMPACT, num_heads=3)))
    hostile = artifact.encode(metadata(config), {}, artifact.Storage(False, "rans", 1))
    (tmp_path / "hostile.sngpt").write_bytes(hostile.data)
    name, *options = arguments
    done = execute(built.data, tmp_path, tmp_path / name, *options, options=["-I"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


SIZE = {"vocab_size": 320, "d_model": 32, "mlp_dim": 64, "max_seq_len": 32}
COMPACT = golf_oracle.like(
    "1573",
    **SIZE,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    value_embed_layers=(1, 3),
    recycle_layers=(0, 1),
    matrix_init="orthogonal",
    logit_chunk=16,
)
SPARSE = ModelConfig(
    **SIZE,
    family="pre_norm",
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    mlp_activation="gelu",
    positions="learned",
    qk_norm=False,
    levels=parse_levels("5,4,0;7,8,8"),
    logit_soft_cap=0.0,
    matrix_init="normal",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "codec"), [(COMPACT, "rans"), (SPARSE, "lzma")], ids=["compact", "sparse"]
)
def test_scores_as_the_project_does(built, tiny_recipe, tmp_path, monkeypatch, model, codec):
    """Exactly, in a process that cannot import the project: a missing module would end it."""
    export = ExportConfig(mlp_bits=5, attention_bits=6, codec=codec, codec_level=9)
    config = replace(load(str(tiny_recipe)), model=model, export=export)
    rng = np.random.default_rng(0)
    tensors = {
        name: 0.1 + rng.random(leaf.shape, np.float32) / 10
        for name, leaf in leaves_by_path(abstract_variables(model)).items()
        if np.issubdtype(leaf.dtype, np.floating)
    }
    stored, storage = quantize_tensors(tensors, config), artifact.Storage(False, codec, 9)
    exported = tmp_path / "tiny.sngpt"
    exported.write_bytes(artifact.encode(metadata(asdict(config)), stored, storage).data)

    mesh = make_mesh()
    loaded = from_artifact(exported, mesh)
    data = tiny_recipe.parent / "data"
    expected = score_validation(
        loaded.config, loaded.variables, loaded.open_data(data), mesh, max_tokens=1024
    )

    # this process's devices and way of compiling
    monkeypatch.setenv("XLA_FLAGS", tiny_run.environment(mesh.devices.size)["XLA_FLAGS"])
    # -S leaves out what makes the project importable; an installed project stays importable
    libraries = sysconfig.get_paths()["purelib"]
    options = {"options": ["-S", "-P"], "PYTHONPATH": libraries}
    arguments = (exported, "--data", data, "--tokens", 1024, "--json")
    done = execute(built.data, tmp_path, *arguments, **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "step": 20,
        "weights": "ema",
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors.values()),
        **asdict(expected),
    }
