"""The console: its text to the letter, and what is printed when."""

import io
import logging
import math
import os
import re
import sys
import time

import numpy as np
import pytest

from sngpt_jax.run.console import Console, format_step
from tests.screen import Clock, Screen, as_terminal, plain

RECORD = {"step": 120, "train_loss": 3.21454, "lr": 0.04, "grad_norm": 0.53219, "tokens": 983040}
RECORD |= {"step_ms": 123.44, "tok_per_s": 66400.4, "mfu": 0.41234, "eta": 192.0}
VAL = {"step": 120, "val_loss": 3.2, "val_bpb": 1.9, "val_seconds": 2.51}


@pytest.mark.parametrize(
    ("record", "steps", "line"),
    [
        (
            RECORD,
            2000,
            "step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.04 │ grad 0.532 │ 123.4 ms │"
            " 66,400 tok/s │ mfu 41.2% │ eta 3m12s",
        ),
        (VAL, 2000, "val  00120/02000 ( 6.0%) │ loss 3.2000 │ bpb 1.9000 │ 2.5 s"),
        (
            {"step": 2000, "train_loss": math.nan, "eta": None},
            2000,
            "step 02000/02000 (100.0%) │ loss nan",
        ),
        ({"step": 7, "step_ms": 12345.6}, 10**6, "step 0000007/1000000 ( 0.0%) │ 12.35 s"),
    ],
)
def test_the_console_line_to_the_letter(record, steps, line):
    assert format_step(record, steps) == line


LARGE = RECORD | {"step": 99_999, "train_loss": 10.8258, "grad_norm": 0.0123, "step_ms": 9999.9}
LARGE |= {"tok_per_s": 1_234_567.0, "eta": 273_600.0}


def test_a_narrow_line_leaves_out_what_matters_least():
    tail = "66,400 tok/s │ mfu 41.2% │ eta 3m12s"
    assert [format_step(RECORD, 2000, width) for width in (111, 110, 97, 87, 76, 68, 56)] == [
        f"step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.04 │ grad 0.532 │ 123.4 ms │ {tail}",
        f"step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.04 │ 123.4 ms │ {tail}",
        f"step 00120/02000 ( 6.0%) │ loss 3.2145 │ 123.4 ms │ {tail}",
        f"step 00120/02000 ( 6.0%) │ loss 3.2145 │ {tail}",
        f"step 00120/02000 │ loss 3.2145 │ {tail}",
        "step 00120/02000 │ loss 3.2145 │ 66,400 tok/s │ eta 3m12s",
        "step 00120/02000 │ loss 3.2145 │ eta 3m12s",
    ]
    assert len(format_step(LARGE, 100_000)) <= 120
    assert len(line := format_step(LARGE, 100_000, 80)) <= 80 and "mfu" in line
    # nothing more to leave out
    assert format_step(RECORD, 2000, 1) == "step 00120/02000 │ loss 3.2145 │ eta 3m12s"


def test_piped_lines_are_plain_and_come_at_their_time():
    clock, out = Clock(), io.StringIO()
    with Console(4000, stream=out, clock=clock) as console:
        for step in range(1, 4001):
            clock.now += 0.1
            console.step({"step": step, "train_loss": 1.0})
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and max(map(len, lines)) <= 120
    printed = [int(re.match(r"step (\d+)/", line)[1]) for line in lines]
    assert printed[:10] == list(range(1, 11)) and printed[-1] == 4000
    gaps = np.diff(printed[9:-1]) * 0.1
    assert gaps.min() >= 2.0 - 1e-6 and gaps.max() <= 4.2  # a hundredth of 400 s at the end
    assert printed == sorted(set(printed))


def test_the_last_step_is_printed_even_when_the_run_ends_early():
    clock, out = Clock(), io.StringIO()
    with pytest.raises(KeyboardInterrupt), Console(4000, stream=out, clock=clock) as console:
        for step in range(1, 20):
            console.step({"step": step})
        raise KeyboardInterrupt
    assert out.getvalue().splitlines()[-1].startswith("step 00019/04000")
    assert out.getvalue().count("00019/") == 1


def test_header_validation_and_long_lines():
    out = io.StringIO()
    with Console(2000, stream=out) as console:
        console.header("model [bold]", [("parameters", "17,059,912"), ("d", "512")])
        console.validation(VAL)
        console.print("sample:\n" + "x" * 500)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:3] == ["model [bold]", "  parameters  17,059,912", "  d           512"]
    assert format_step(VAL, 2000) in lines
    assert lines[-2:] == ["sample:", "x" * 119 + "…"] and max(map(len, lines)) <= 120


@pytest.mark.parametrize(("columns", "has_bar"), [(80, False), (120, False), (160, True)])
def test_the_live_line_fits_the_terminal(monkeypatch, columns, has_bar):
    as_terminal(monkeypatch, columns)
    out = Screen()
    with Console(2000, stream=out, clock=Clock()) as console:
        for step in range(1, 12):  # the eleventh is not printed
            console.step(RECORD | {"step": step})
        await_text(out, "00011/02000")
        lines = re.split(r"[\r\n]", plain(out.getvalue()))
        (live,) = {line.rstrip() for line in lines if "00011/02000" in line}
    assert len(live) <= columns and "…" not in live and ("━" in live) == has_bar
    for name in ("loss", "tok/s", "mfu", "eta 3m12s", "lr", "grad", "ms"):
        assert (name in live) == (columns > 80 or name not in ("lr", "grad", "ms")), name


def await_text(out: Screen, text: str) -> None:
    """The live line is drawn by its own thread."""
    deadline = time.monotonic() + 10
    while text not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text in out.getvalue()


def test_a_terminal_has_a_live_line_and_keeps_the_printed_ones(monkeypatch):
    as_terminal(monkeypatch, 160)
    clock, out = Clock(), Screen()
    with Console(2000, stream=out, clock=clock) as console:
        for step in range(1, 31):
            console.step(RECORD | {"step": step})
        console.validation(VAL)
        await_text(out, "00030/02000")
    text = out.getvalue()
    assert "\x1b[" in text and "\x1b[?25h" in text  # the cursor is given back
    for record in (RECORD | {"step": 3}, VAL):
        assert format_step(record, 2000) in plain(text)


def test_a_run_that_ends_by_the_clock_is_as_far_as_the_clock(monkeypatch):
    as_terminal(monkeypatch, 160)
    out, screen = io.StringIO(), Screen()
    for stream in (out, screen):
        with Console(20_000, 600.0, stream=stream, clock=Clock()) as console:
            console.step(RECORD | {"elapsed_seconds": 150.0})
            console.validation(VAL)
            console.step(RECORD | {"step": 19_000, "elapsed_seconds": 300.0})
            console.step(RECORD | {"step": 19_500, "elapsed_seconds": 600.5})
    for text in (out.getvalue(), plain(screen.getvalue())):
        # a screen has each twice
        places = dict.fromkeys(re.findall(r"(step|val)  ?(\d+)/20000 \( *([\d.]+)%\)", text))
        assert list(places) == [
            ("step", "00120", "25.0"),
            ("val", "00120", "25.0"),
            ("step", "19000", "95.0"),
            ("step", "19500", "100.0"),
        ]


def test_printed_steps_fit_a_narrow_terminal(monkeypatch):
    as_terminal(monkeypatch, 40)
    out = Screen()
    with Console(2000, stream=out, clock=Clock()) as console:
        console.step(RECORD)
    assert "step 00120/02000 │ loss 3.2145 │ eta 3m12s" in plain(out.getvalue())
    assert "tok/s" not in out.getvalue()


def test_work_aside_takes_the_live_line_while_it_lasts(monkeypatch):
    as_terminal(monkeypatch, 160)
    out = Screen()
    with Console(2000, stream=out, clock=Clock()) as console:
        report = console.progress("validation")
        report(3, 8)
        await_text(out, "37.5%, 3/8 in 0.0s")
        report(8, 8)
        console.step(RECORD)
        await_text(out, "00120/02000")
    assert "8/8" not in out.getvalue() and "━ validation: " in plain(out.getvalue())


def test_quiet_prints_the_result_alone(monkeypatch, capsys, caplog):
    caplog.set_level(logging.WARNING, "sngpt_jax")  # as a command's --quiet sets it
    as_terminal(monkeypatch, 80)
    out = Screen()
    with Console(2000, quiet=True, stream=out) as console:
        console.header("configuration", [("a", "b")])
        console.print("compiling …")
        console.step(RECORD)
        console.progress("validation")(1, 2)
        console.validation(VAL)
        console.result("finished", [("run", "runs/x")], ["next"])
    assert plain(out.getvalue()) == "finished\n  run  runs/x\n" and capsys.readouterr().err == ""


def test_the_result_comes_after_the_last_step_and_whole():
    out = io.StringIO()
    with Console(2000, stream=out) as console:
        for step in range(1, 12):
            console.step({"step": step})
        console.result("finished", [("checkpoint", "x/" * 100)])
    assert out.getvalue().splitlines()[-3:] == [
        "step 00011/02000 ( 0.5%)",
        "finished",
        f"  checkpoint  {'x/' * 100}",
    ]


def test_a_run_goes_on_where_nobody_reads_its_lines():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, Console(2000, stream=stream) as console:
        console.print("compiling")
        for step in range(1, 2001):
            console.step({"step": step})
        console.result("finished", [("run", "runs/x")])


def test_a_log_line_beside_the_live_line_is_whole(monkeypatch):
    """It may be a command to paste."""
    as_terminal(monkeypatch, 60)
    out = Screen()
    monkeypatch.setattr(sys, "stderr", out)
    command = f"to go on: python -m sngpt_jax.train --run-dir {'x' * 80} --train.steps 3000"
    with Console(2000, stream=out, clock=Clock()) as console:
        console.step(RECORD)
        print(command, file=sys.stderr)
    assert command in plain(out.getvalue())
