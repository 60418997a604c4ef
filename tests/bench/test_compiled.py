"""The table of compiled steps beside an older commit's."""

import json

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import compiled
from sngpt_jax.bench.arguments import CompiledArguments


def test_ratios_are_now_over_before(monkeypatch):
    before = json.loads(compiled.BASELINE.read_text())["recipes"]["golf_baseline"]
    now = {"bytes": before["bytes"] / 2, "bound_seconds": before["bound_seconds"], "launches": 559}
    monkeypatch.setattr(compiled, "figures", lambda name, topology: now)
    said: list[str] = []
    result = compiled.measure(CompiledArguments(recipes=("golf_baseline",)), said.append)
    assert result["recipes"]["golf_baseline"] == {"now": now, "before": before}
    assert said[-1] == "| `golf_baseline` | 33.5 | 21.5 | 559 | 0.500 | 1.000 | 0.500 |"


def test_a_recipe_without_older_figures_is_refused():
    with pytest.raises(UserError, match="quickstart; it has those of golf_baseline"):
        compiled.measure(CompiledArguments(recipes=("quickstart",)), print)
