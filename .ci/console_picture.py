"""Draws the log of a training as a terminal shows it.

Run it as `python .ci/console_picture.py LOG PICTURE.svg`. The log was written to a pipe, so it has
no colours and no panel. They are added here as `sngpt_jax.run.console` and
`sngpt_jax.base.terminal` draw them. Nothing else is added, and `…` stands for lines left out.
"""

import io
import re
import sys
from pathlib import Path

import rich._export_format
import rich.panel
import rich.table
import rich.text
from rich.console import Console

COLUMNS = 104
COMMAND = "$ ./launch.sh train --config configs/quickstart.py"
FIRST, LAST = 4, 3  # lines of steps that are shown at the start and at the end
SAMPLE = 4  # lines of the sample


def sections(log: str) -> dict[str, list[str]]:
    """The lines of the log below each title, without the title."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in log.splitlines():
        if re.match(r"(sngpt_jax \S+|parameter +shape.*|compiling.*|finished|sample:)$", line):
            title = line.split()[0]
            found[title] = [line]
        elif title:
            found[title].append(line)
    return found


def draw(log: str, console: Console) -> None:
    """Prints the log on `console`."""
    found = sections(log)
    console.print(COMMAND, style="bold cyan")
    title, *rows = found["sngpt_jax"]
    console.print(title, style="bold")
    for row in rows:
        console.print(row)
    steps = found["compiling"]
    cut = 2 + FIRST  # after the two lines about compiling
    for line in [*steps[:cut], "…", *steps[-LAST:]]:
        console.print(line, style="bold green" if line.startswith("val") else "")
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in found["finished"][1:]:
        grid.add_row(*row.split(None, 1))
    console.print(
        rich.panel.Panel(
            grid, title="finished", title_align="left", expand=False, border_style="green"
        )
    )
    for line in [*found["sample:"][: 1 + SAMPLE], "…"]:
        console.print(line)


def main(log: Path, picture: Path) -> None:
    console = Console(record=True, width=COLUMNS, highlight=False, markup=False, file=io.StringIO())
    draw(log.read_text(), console)
    # the picture loads no font from a network
    style = re.sub(
        r"@font-face \{\{.*?\}\}\n", "", rich._export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL
    )
    style = style.replace("font-family: Fira Code, monospace", "font-family: monospace")
    picture.parent.mkdir(exist_ok=True)
    picture.write_text(console.export_svg(title="sngpt_jax", code_format=style))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
