"""The table of compiled steps beside an older commit's."""

import json
import types

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import compiled
from sngpt_jax.bench.arguments import CompiledArguments


def test_ratios_are_now_over_before(monkeypatch):
    before = json.loads(compiled.BASELINE.read_text())["recipes"]["golf_baseline"]
    now = {"bytes": before["bytes"] / 2, "bound_seconds": before["bound_seconds"], "launches": 559}
    less = now | {"bytes": before["bytes"] / 4}
    ways = {"xla": now, "pallas_triton": less}
    monkeypatch.setattr(compiled, "figures", lambda config, topology: ways[config.model.mlp])
    said: list[str] = []
    result = compiled.measure(CompiledArguments(recipes=("golf_baseline",)), said.append)
    expected = {"now": now, "with_products": less, "before": before}
    assert result["recipes"]["golf_baseline"] == expected
    assert said[-2:] == [
        "| `golf_baseline` | `xla` | 33.5 | 21.5 | 559 | 0.500 | 1.000 | 0.500 |",
        "| `golf_baseline` | `pallas_triton` | 16.8 | 21.5 | 559 | 0.250 | 1.000 | 0.500 |",
    ]


def test_a_recipe_without_older_figures_is_refused():
    with pytest.raises(UserError, match="quickstart; it has those of golf_baseline"):
        compiled.measure(CompiledArguments(recipes=("quickstart",)), print)


def test_instructions_of_the_sparse_codes_kernels_stand_beside_the_older_ones(monkeypatch):
    older = json.loads(compiled.BASELINE.read_text())
    before = older["recipes"]["cayley_small_3l"]
    now = {"cayley_forward": (32_931.0, 59.0), "cayley_backward": (27_265.0, 1.0)}
    monkeypatch.setattr(compiled, "figures", lambda config, topology: before)
    monkeypatch.setattr(compiled, "instructions", lambda case, target: now)
    said: list[str] = []
    result = compiled.measure(CompiledArguments(recipes=("cayley_small_3l",)), said.append)
    assert result["instructions"] == now
    assert said[-2] == "| `cayley_forward` | 32,931 | 0.500 | 59 | 236 |"
    assert said[-1] == "| `cayley_backward` | 27,265 | 1.000 | 1 | 0 |"


def test_instructions_come_from_the_inspection_of_kernels(monkeypatch):
    loops = [{"warp_instructions": 4.5, "barriers": 1.0, "shares": {}}] * 2
    kernels = [{"name": "cayley_forward", "by_loop": loops}, {"name": "by_xla"}]
    report = {"cases": [{"programs": [{"kernels": []}, {"kernels": kernels}]}]}
    done = types.SimpleNamespace(stdout=json.dumps(report), stderr="")
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: done)
    assert compiled.instructions("small", "h100") == {"cayley_forward": (9.0, 2.0)}
    failed = types.SimpleNamespace(stdout="", stderr="warning\nerror: needs nvdisasm; run: pip")
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="^needs nvdisasm; run: pip$"):
        compiled.instructions("small", "h100")
