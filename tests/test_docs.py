"""What the documentation says stands in the tree: its links lead somewhere, and its commands are ones that launch.sh knows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for command in re.findall(r"\./launch\.sh (\w+)", text):
        module = {
            "prepare": "data/prepare",
            "features": "evaluation/features",
            "export": "export/__main__",
            "bench": "bench/__main__",
        }.get(command, command)
        assert command == "test" or (ROOT / "sngpt_jax" / f"{module}.py").exists(), command
    for recipe in re.findall(r"--config (?:configs/)?(\w+)(?:\.py)?", text):
        assert recipe == "runs" or (ROOT / "configs" / f"{recipe}.py").exists(), recipe
