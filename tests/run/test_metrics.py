"""Metrics that read back bit for bit and survive kills, TensorBoard beside them, and speed."""

import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from sngpt_jax.base.errors import UserError, one_line
from sngpt_jax.run.meter import StepMeter, peak_flops
from sngpt_jax.run.metrics import MetricsWriter, read_metrics
from tests.screen import Clock
from tests.tiny_run import ROOT


def test_a_line_is_json_that_begins_with_its_step(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write({"train_loss": 0.1 + 0.2, "step": 1, "note": "a\nb"})
        text = (tmp_path / "metrics.jsonl").read_text()  # flushed, before close
    assert text == '{"step": 1, "train_loss": 0.30000000000000004, "note": "a\\nb"}\n'


@given(st.floats(width=64) | st.floats(width=32))
def test_floats_come_back_bit_equal_and_non_finite_as_null(tmp_path_factory, value):
    run_dir = tmp_path_factory.mktemp("run")
    with MetricsWriter(run_dir, resume_step=None) as writer:
        writer.write({"step": 0, "train_loss": value})
    text = (run_dir / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    if math.isfinite(value):
        assert struct.pack("d", record["train_loss"]) == struct.pack("d", value)
    else:
        assert record["train_loss"] is None


def write_run(run_dir, steps, resume_step):
    with MetricsWriter(run_dir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write({"step": step, "train_loss": 1 / (step + 3)})
            if step % 4 == 0:
                writer.write({"step": step, "val_loss": math.nan, "val_bpb": 1 / (step + 7)})


@pytest.mark.parametrize("torn", [0, 1, 5, 30])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path, torn):
    write_run(tmp_path / "whole", range(1, 21), None)
    write_run(tmp_path / "killed", range(1, 15), None)
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -torn or None])
    write_run(tmp_path / "killed", range(9, 21), 8)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    names = {p.name for p in (tmp_path / "killed").iterdir()}
    assert names == {"metrics.jsonl", "tensorboard"}
    write_run(tmp_path / "killed", [1], None)  # a new start, where no checkpoint was left
    assert [r["step"] for r in read_metrics(path)] == [1]


def test_only_the_last_line_may_be_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": null}\n{"step": 2}\n{"step": 3, "x')
    assert read_metrics(path) == [{"step": 1, "x": None}, {"step": 2}]
    for bad in ('{"step": 1', "[]", '{"x": 1}', '{"step": "1"}', ""):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a metrics record"):
            read_metrics(path)
    path.write_text("")
    assert read_metrics(path) == []
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_full_disk_ends_tensorboard_with_a_line_and_not_the_run(tmp_path, caplog):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        records = writer._board._file._py_recordio_writer
        records._writer.close()
        records._writer = open("/dev/full", "wb")  # noqa: SIM115 - closed by the writer
        for step in range(3000):  # more than any queue or buffer takes
            writer.write({"step": step, "train_loss": 1.0})
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(3000))
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path}/tensorboard: no longer written: No space left on device")


def test_a_record_that_cannot_be_written_is_one_line_and_nothing_follows_it(tmp_path):
    with pytest.raises(OSError) as error, MetricsWriter(tmp_path, resume_step=None) as writer:
        writer._file.close()
        writer._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the writer
        writer.write({"step": 1})
    said = f"{tmp_path}/metrics.jsonl cannot be written: No space left on device; free space"
    assert one_line(error.value).startswith(said)


WITHOUT_TORCH = """
import pathlib, sys
from sngpt_jax.run.metrics import MetricsWriter
assert not {"tensorboardX", "torch"} & set(sys.modules), "only a run that writes needs them"
with MetricsWriter(pathlib.Path(sys.argv[1]), resume_step=None) as writer:
    writer.write({"step": 1, "train_loss": 1.0})
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
import torch
"""


def test_tensorboard_imports_no_torch(tmp_path):
    """A module that says when it is imported stands for torch, which may be installed or not."""
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stderr == "imported\n"


def read_events(run_dir) -> list[Event]:
    """TFRecord framing by hand: length u64, its checksum u32, the bytes, their checksum u32."""
    events = []
    for path in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_tensorboard_has_the_same_numbers_grouped(tmp_path):
    with MetricsWriter(tmp_path, resume_step=8) as writer:
        writer.write({"step": 9, "train_loss": 0.5, "lr": 0.25, "tokens": 7, "note": "text"})
        writer.write({"step": 9, "val_bpb": math.inf, "code/level0/dead": 0.75})
    events = read_events(tmp_path)
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    expected = {"train/loss": 0.5, "train/lr": 0.25, "train/tokens": 7.0, "val/bpb": math.inf}
    expected["code/level0/dead"] = 0.75
    assert scalars == {(tag, 9): value for tag, value in expected.items()}
    # what TensorBoard drops earlier events from
    assert [e.step for e in events if e.HasField("session_log")] == [9]


def test_the_meter_against_arithmetic():
    clock = Clock()
    meter = StepMeter(tokens_per_step=1000, flops_per_token=6e6, peak_flops=1e11, clock=clock)
    assert meter.eta(5) is None
    with pytest.raises(ValueError):
        meter.stop(1)
    meter.start(0)
    clock.now += 0.5
    assert meter.stop(1) == pytest.approx({"step_ms": 500, "tok_per_s": 2000, "mfu": 0.12})
    clock.now += 2.0
    # four steps between two reads
    assert meter.stop(5) == pytest.approx({"step_ms": 500, "tok_per_s": 2000, "mfu": 0.12})
    clock.now += 60.0  # a validation
    meter.start(5)
    clock.now += 0.25
    assert meter.stop(6)["step_ms"] == pytest.approx(250)
    assert meter.eta(10) == pytest.approx(5.0)  # median of 0.5, 0.5, 0.25
    with pytest.raises(ValueError):
        meter.stop(6)
    without = StepMeter(1000, 6e6, None, clock=clock)
    without.start(0)
    clock.now += 1
    assert set(without.stop(1)) == {"step_ms", "tok_per_s"}


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=80))
def test_eta_is_the_median_of_the_last_32(seconds):
    clock = Clock()
    meter = StepMeter(1, 1.0, None, clock=clock)
    meter.start(0)
    for step, duration in enumerate(seconds, 1):
        clock.now += duration
        meter.stop(step)
    assert meter.eta(7) == pytest.approx(7 * np.median(seconds[-32:]), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H100", None),  # could be any of three
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_dense_peaks(kind, peak):
    assert peak_flops(kind) == peak
