"""Paths of a command line in home folders, by the types of the fields."""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from sngpt_jax.base.errors import UserError
from sngpt_jax.config import PathText, command
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import Json, OptionalPath
from sngpt_jax.config.recipe import parse_command, peek
from sngpt_jax.prepare import Arguments as PrepareArguments
from sngpt_jax.sample import SampleArguments
from sngpt_jax.train import TrainArguments


@dataclass(frozen=True)
class Inner:
    data: PathText = ""
    text: str = ""


@dataclass(frozen=True)
class Arguments:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: OptionalPath = None
    json: Json = ""
    prompt: str = ""
    inner: Inner = Inner()


def test_paths_are_expanded_and_texts_are_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    me = pwd.getpwuid(os.getuid())
    argv = ["~/run", "x~/c", "--json=~/b", "--prompt", "~/d is no path", "--inner.data", "~"]
    argv += ["--inner.text=~/e", "--out", f"~{me.pw_name}/f"]
    found = parse(Arguments, argv, program="test")
    assert found == Arguments(
        runs=(Path("/home/me/run"), Path("x~/c")),
        out=Path(me.pw_dir, "f"),
        json="/home/me/b",
        prompt="~/d is no path",
        inner=Inner("/home/me", "~/e"),
    )
    assert peek(["--run=~/r"], "--run") == "/home/me/r"
    with pytest.raises(UserError, match="there is no user nobody-here"):
        parse(Arguments, ["--out", "~nobody-here/a"], program="test")


def test_commands_know_which_of_their_texts_are_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse(PrepareArguments, ["--source", "~/a.txt", "--out=~/b"], program="prepare")
    assert (found.source, found.out) == ("/home/me/a.txt", "/home/me/b")
    found = parse(SampleArguments, ["--run", "~/r", "--prompt", "~/"], program="sample")
    assert (found.run, found.prompt) == (Path("/home/me/r"), "~/")
    argv = ["--config", "quickstart", "--data.dir", "~/d", "--run-dir=~/r"]
    argv += ["--eval.sample-prompt", "~/"]
    found = parse_command(TrainArguments, argv, program="train", description="")
    assert (found.overrides.data.dir, found.run_dir) == ("/home/me/d", "/home/me/r")
    assert found.overrides.eval.sample_prompt == "~/"


def test_every_command_expands_its_paths():
    package = Path(command.__file__).parents[1]
    direct = [path.name for path in package.rglob("*.py") if "tyro.cli" in path.read_text()]
    assert direct == ["command.py"]
