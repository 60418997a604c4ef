"""Progress and results to the letter: on terminals, in a file, quiet and in plain characters."""

import io
import logging
import os
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.terminal import TerminalConsole, format_duration, progress_reporter, show_result
from tests.screen import Clock, Screen, as_terminal, plain


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """The package's log as a command sets it up, without a line that another test has left."""
    logger = logging.getLogger("sngpt_jax")
    before = logger.handlers, logger.propagate, logger.level
    monkeypatch.setattr(terminal, "_shown", None)
    cli.log_to_stderr()
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


DURATIONS = {0: "0.0s", 0.44: "0.4s", 9.94: "9.9s", 9.96: "10s", 59.4: "59s", 59.6: "1m00s"}
DURATIONS |= {192: "3m12s", 3599.6: "1h00m", 7500: "2h05m", 86399: "1d00h", 273_600: "3d04h"}


@pytest.mark.parametrize("seconds", DURATIONS)
def test_durations(seconds):
    assert format_duration(seconds) == DURATIONS[seconds]


def parse_duration(text: str) -> float:
    unit, parts = {"s": 1, "m": 60, "h": 3600, "d": 86400}, re.findall(r"([\d.]+)([smhd])", text)
    return sum(float(number) * unit[letter] for number, letter in parts)


@given(st.floats(0, 1e7))
def test_durations_say_what_they_stand_for(seconds):
    text = format_duration(seconds)
    # half an hour of a day, half a tenth
    assert parse_duration(text) == pytest.approx(seconds, rel=0.021, abs=0.051)
    assert len(text) <= 7


def reported(out, dones, total, seconds=0.125, label="evaluate"):
    """What `out` holds after reports, each so many seconds after the one before."""
    clock = Clock()
    report = progress_reporter(label, stream=out, clock=clock)
    for done in dones:
        clock.now += seconds
        report(done, total)
    return out.getvalue()


def test_progress_speaks_after_two_seconds_and_ends():
    out = io.StringIO()
    reported(out, range(1, 101), 100)
    assert out.getvalue().splitlines() == [
        "evaluate: 16.0%, 10s left, 16/100 in 2.0s",
        "evaluate: 56.0%, 5.5s left, 56/100 in 7.0s",
        "evaluate: 96.0%, 0.5s left, 96/100 in 12s",
        "evaluate: 100.0%, 100/100 in 12s",
    ]
    assert reported(io.StringIO(), range(1, 101), 100, seconds=0) == ""


def drawn(out: Screen) -> list[str]:
    """Each new state of the line that is drawn again and again."""
    parts = (plain(part).rstrip() for part in re.split(r"[\r\n]", out.getvalue()))
    return list(dict.fromkeys(filter(None, parts)))


def test_a_terminal_has_one_line_with_a_bar(monkeypatch):
    as_terminal(monkeypatch, 80)
    out = Screen()
    text = reported(out, range(1, 41), 40)
    lines = drawn(out)
    assert lines[0] == "━━━━━━╺━━━━━━━━━ evaluate: 40.0%, 3.0s left, 16/40 in 2.0s"
    assert lines[-1] == "━━━━━━━━━━━━━━━━ evaluate: 100.0%, 40/40 in 5.0s"
    assert len(lines) == 13, "a drawing every fifth of a second, as the reports come by"
    assert text.count("\n") == 1 and "\x1b[3" in text
    assert text.endswith("\n\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (60, "━━━━━━╺━━━━━━━━━ evaluate: 40.0%, 3.0s left, 16/40 in 2.0s"),
        (59, "evaluate: 40.0%, 3.0s left, 16/40 in 2.0s"),
        (30, "evaluate: 40.0%, 3.0s left, 1…"),
        (1, "…"),
    ],
)
def test_a_narrow_terminal_is_told_what_matters(monkeypatch, columns, line):
    as_terminal(monkeypatch, columns)
    out = Screen()
    reported(out, range(1, 17), 40)
    assert drawn(out) == [line]


def test_work_of_unknown_length_and_notes():
    clock, out = Clock(), io.StringIO()
    report = progress_reporter("data: train", stream=out, clock=clock)
    for note, total in (("5 documents", 0), ("9 documents", 1)):
        clock.now += 5
        report(0.75 * total, total, note)
    assert out.getvalue().splitlines() == [
        "data: train: 5 documents in 5.0s",
        "data: train: 75.0%, 9 documents in 10s",
    ]


def test_what_was_done_before_is_no_part_of_the_speed():
    text = reported(io.StringIO(), (900, 910), 1000, seconds=1, label="data")
    assert text == "data: 91.0%, 9.0s left, 910/1,000 in 2.0s\n"


def test_quiet_is_silent_but_for_warnings(monkeypatch, capsys):
    cli.log_to_stderr(quiet=True)
    assert reported(io.StringIO(), range(1, 41), 40, seconds=5) == ""
    terminal.logger.info("hidden")
    terminal.logger.warning("shown")
    assert capsys.readouterr().err == "shown\n"


def test_a_log_line_stands_above_the_drawn_one(monkeypatch):
    as_terminal(monkeypatch, 80)
    clock, out = Clock(), Screen()
    monkeypatch.setattr(sys, "stderr", out)
    report = progress_reporter("evaluate", clock=clock)
    clock.now += 2
    report(16, 40)
    terminal.logger.info("a line of the log, " + "x" * 100)
    terminal.clear()
    assert f"\r\x1b[2Ka line of the log, {'x' * 100}\n" in out.getvalue()
    assert out.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K") and sys.stderr is out


@pytest.mark.parametrize(
    ("error", "said"),
    [(UserError("no such thing"), "error: no such thing"), (KeyboardInterrupt(), "interrupted")],
)
def test_an_error_does_not_stand_behind_a_line_of_progress(monkeypatch, error, said):
    as_terminal(monkeypatch, 80)
    out = Screen()
    monkeypatch.setattr(sys, "stderr", out)

    def main(argv):
        clock = Clock()
        report = progress_reporter("evaluate", clock=clock)
        clock.now += 2
        report(16, 40)
        raise error

    with pytest.raises(SystemExit):
        cli.run(main)
    assert out.getvalue().endswith(f"\x1b[?25h\r\x1b[1A\x1b[2K{said}\n")


@pytest.mark.parametrize(
    ("name", "value"), [("TERM", "dumb"), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1")]
)
def test_what_has_no_cursor_gets_plain_lines(monkeypatch, name, value):
    as_terminal(monkeypatch, 80)
    monkeypatch.setenv(name, value)
    clock, out = Clock(), Screen() if name == "TERM" else io.StringIO()
    report = progress_reporter("evaluate", stream=out, clock=clock)
    clock.now += 2
    report(16, 40)
    console = TerminalConsole(out)
    console.print("bold", style="bold green")
    show_result("evaluated", [("score", "1.0")], console=console)
    assert out.getvalue() == "evaluate: 40.0%, 16/40 in 2.0s\nbold\nevaluated\n  score  1.0\n"


ROWS = [("run", "/tmp/" + "long/" * 30), ("score", "1.0 [bold]bits[/bold]/byte")]


def test_an_error_is_one_line_that_no_terminal_obeys(capsys):
    def main(argv):
        raise UserError("a\nb\x1b[2J\x9b\x7f é")

    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: a b\\x1b[2J\\x9b\\x7f é\n"


def test_a_result_in_a_file_is_plain_and_whole(capsys):
    show_result("evaluated", ROWS, ["python -m next --run 'a b'"])
    out, err = capsys.readouterr()
    assert out == f"evaluated\n  run    {ROWS[0][1]}\n  score  {ROWS[1][1]}\n"
    assert err == "next: python -m next --run 'a b'\n"


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_result_on_a_terminal_is_a_panel(monkeypatch, capsys, columns):
    as_terminal(monkeypatch, columns)
    out = Screen()
    show_result("evaluated", ROWS, ["python -m next " + "x" * 200], console=TerminalConsole(out))
    first, *middle, last = plain(out.getvalue()).splitlines()
    assert first.startswith("╭─ evaluated ─") and last.startswith("╰─")
    assert {line[0] + line[-1] for line in middle} == {"││"}
    assert {len(line) for line in (first, *middle, last)} == {columns}
    path = "".join(line[9:-2].strip() for line in middle[:-1]).replace(" ", "")
    assert path.startswith(ROWS[0][1])
    assert "1.0 [bold]bits[/bold]/byte" in middle[-1] and "\x1b[" in out.getvalue()
    assert capsys.readouterr().err == f"next: python -m next {'x' * 200}\n", "whole, to be pasted"


def test_a_quiet_result_is_plain_and_suggests_nothing(monkeypatch, capsys):
    as_terminal(monkeypatch, 80)
    cli.log_to_stderr(quiet=True)
    out = Screen()
    show_result("evaluated", [("score", "1.0")], ["python -m next"], console=TerminalConsole(out))
    assert out.getvalue() == "evaluated\n  score  1.0\n" and capsys.readouterr() == ("", "")


def test_no_colour_where_the_user_wants_none(monkeypatch):
    as_terminal(monkeypatch, 80)
    monkeypatch.setenv("NO_COLOR", "1")
    out = Screen()
    show_result("evaluated", [("score", "1.0")], console=TerminalConsole(out))
    assert "╭─ evaluated ─" in out.getvalue() and not re.search(r"\x1b\[3\d", out.getvalue())


def test_every_encoding_can_show_what_is_printed(monkeypatch):
    bytes_ = io.BytesIO()
    stream = io.TextIOWrapper(bytes_, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        cli.run(lambda argv: print("│ 2 × 3 … ▁é\udc80") or 0)
    assert bytes_.getvalue() == b"| 2 x 3 ... _\\xe9\\udc80\n"


def test_a_stdout_that_was_closed_before_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda argv: 0)
    assert ended.value.code == 0


def test_a_reader_that_has_gone_ends_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        clock = Clock()
        report = progress_reporter("evaluate", stream=stream, clock=clock)
        for done in (16, 30, 40):
            clock.now += 5
            report(done, 40)
