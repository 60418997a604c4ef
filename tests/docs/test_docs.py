"""What the documentation says stands in the tree: its links lead somewhere, its commands are ones
that launch.sh knows, with options that they have.

That the anchors of links exist too, .ci/docs checks on the built site.
"""

import importlib
import re
from pathlib import Path

import pytest

from sngpt_jax.bench import __main__ as bench

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {name: f"{name}.__main__" for name in ("features", "bench", "report")}


def commands(text):
    """Each command that a text gives launch.sh, with the rest of its line; a backslash goes on to
    the next line.
    """
    return re.findall(r"\./launch\.sh (\w+)([^`\n#]*)", text.replace("\\\n", " "))


def kind_of(command, words):
    """The word that chooses among a command's kinds, each of which has its own options; or none."""
    if command == "plan":
        return ["--kernels"] if "--kernels" in words else []
    has_kinds = command == "interop" or (command == "bench" and words and words[0] in bench.NAMES)
    return words[:1] if has_kinds else []


def written_options(page):
    """Pairs of a command, with its kind, and an option that a page uses with it."""
    for command, rest in commands(page.read_text()):
        if command not in ("test", "docs"):
            words = rest.split()
            kind = kind_of(command, words)
            yield from (
                (" ".join([command, *kind]), word.partition("=")[0].rstrip(".,;:)"))
                for word in words
                if re.match("--[a-z]", word) and word not in kind
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    # code indexes and calls, as links do
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (page.parent / link).exists(), link
    for command, _ in commands(text):
        module = ROOT / "sngpt_jax" / MODULES.get(command, command).replace(".", "/")
        assert command in ("test", "docs") or module.with_suffix(".py").exists(), command
    for recipe in re.findall(r"--config (?:configs/)?(\w+)(?:\.py)?", text):
        saved = (
            f"\n```python\n# {recipe}.py\n" in text
            or f"\n```python\n# configs/{recipe}.py\n" in text
        )
        assert recipe == "runs" or saved or (ROOT / "configs" / f"{recipe}.py").exists(), recipe


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text()
    for page in PAGES:
        folder = "" if page.parent.name == "docs" else "../"
        assert page.name == "index.md" or f"]({folder}{page.name})" in index, page.name


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command, _ in written_options(page)})
)
def test_options_are_ones_that_the_command_has(command, capsys):
    name, *kind = command.split()
    main = importlib.import_module(f"sngpt_jax.{MODULES.get(name, name)}").main
    with pytest.raises(SystemExit):
        main([*kind, "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    assert len(known) > 3
    for page in PAGES:
        unknown = {
            option for written, option in written_options(page) if written == command
        } - known
        # that a how-to's patch adds
        fields = re.findall(r"^\+    (\w+): ", page.read_text(), flags=re.MULTILINE)
        assert unknown <= {f"--model.{field.replace('_', '-')}" for field in fields}, page.name
