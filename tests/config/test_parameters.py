"""The table of parameters names every tensor of every recipe once."""

import re
from pathlib import Path

import jax
import pytest

from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config.parameters import PARAMETERS, parameter
from sngpt_jax.config.recipe import load
from sngpt_jax.model.forward import abstract_parts

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py"))


def paths(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def rows(path):
    return [row for row in PARAMETERS if re.fullmatch(row.pattern, path)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_of_a_recipe_has_one_row(name):
    parameters, statistics = map(paths, abstract_parts(load(name).model))
    assert [path for path in parameters + statistics if len(rows(path)) != 1] == []
    assert [path for path in parameters if parameter(path).optimizer is None] == []
    assert [path for path in statistics if parameter(path).optimizer is not None] == []


def test_every_row_is_some_recipes():
    found = {
        row
        for name in RECIPES
        for part in abstract_parts(load(name).model)
        for path in paths(part)
        for row in rows(path)
    }
    assert set(PARAMETERS) == found


def test_an_unknown_tensor_is_named():
    with pytest.raises(ValueError, match="tensor blocks/0/new has no row"):
        parameter("blocks/0/new")
