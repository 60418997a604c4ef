"""Checkpoints come back bit for bit or not at all."""

import dataclasses
import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.run import checkpoint
from sngpt_jax.run.checkpoint import Checkpointer, CheckpointError, restore, restore_parts, steps
from sngpt_jax.run.records import is_read, reading, record_path


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_state(seed: int) -> dict:
    """A state with the kinds of leaf that training has."""
    rng = np.random.default_rng(seed)
    w, v = rng.standard_normal((2, 16, 8), dtype=np.float32)
    w[0, :4] = [np.nan, np.inf, -0.0, 1e-45]
    return {
        "params": {
            "blocks": [{"w": jnp.asarray(w)}, {"w": jnp.asarray(v).astype(jnp.bfloat16)}],
            "a/b.c": jnp.float32(seed),
        },
        "opt_state": (Moments(jnp.int32(seed), {"x": jnp.asarray(v)}), None, ()),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
    }


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def bits(leaf) -> tuple:
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()


def assert_bit_equal(found, expected) -> None:
    assert jax.tree.map(bits, found) == jax.tree.map(bits, expected)


def read(directory: Path, step: int | None = None):
    return restore(directory, abstract(make_state(0)), step)


def save_steps(directory: Path, *values: tuple[int, float | None], keep: int = 10) -> None:
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step, value in values:
            checkpointer.save(step, make_state(step), {"position": step * 10}, value=value)


def recorded_value(directory: Path, step: int) -> float | None:
    return json.loads((directory / f"{step:08d}.json").read_text())["record"]["value"]


def test_roundtrip_is_bit_equal_with_extra_and_value(tmp_path):
    extra = {"position": [3, 2**53 + 1], "elapsed": 0.1 + 0.2, "config": "é\n"}
    extra["nested"] = {"none": None, "yes": True}
    directory = tmp_path / "new" / "checkpoints"
    with Checkpointer(directory, keep=1) as checkpointer:
        checkpointer.save(7, make_state(7), extra, value=1.25)
    restored = read(directory)
    assert_bit_equal(restored.state, make_state(7))
    assert (restored.step, restored.extra) == (7, extra)
    assert recorded_value(directory, 7) == 1.25
    assert restored.state["params"]["blocks"][0]["w"].devices() == {jax.devices()[0]}
    drawn = jax.random.normal(restored.state["keys"][1], (4,))
    np.testing.assert_array_equal(drawn, jax.random.normal(make_state(7)["keys"][1], (4,)))


def test_an_empty_folder_holds_nothing(tmp_path):
    assert read(tmp_path / "absent") is None
    assert steps(tmp_path / "absent") == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        restore_parts(tmp_path, {})


def test_parts_alone(tmp_path):
    save_steps(tmp_path, (1, None), (2, None))
    for names in (["params"], ["keys", "params"], ["key"]):
        part = {name: make_state(1)[name] for name in names}
        restored = restore_parts(tmp_path, abstract(part), 1)
        assert_bit_equal(restored.state, part)
        assert (restored.step, restored.extra) == (1, {"position": 10})
    params = abstract(make_state(1)["params"])
    with pytest.raises(CheckpointError, match=r"count: saved int32\[\], expected nothing"):
        restore(tmp_path, {"params": params})
    with pytest.raises(CheckpointError, match=r"averages: saved nothing, expected key<fry>\[\]"):
        restore_parts(tmp_path, {"averages": abstract(jax.random.key(0))})
    del params["blocks"][1]  # a part is asked for whole
    with pytest.raises(CheckpointError, match=r"1/w: saved bfloat16\[16,8\], expected nothing"):
        restore_parts(tmp_path, {"params": params})


def test_a_state_that_does_not_fit_is_one_line_naming_leaves(tmp_path):
    save_steps(tmp_path, (1, None), (2, None))
    other = abstract(make_state(0))
    other["params"]["blocks"][0]["w"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    other["params"]["blocks"][1]["w"] = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    other["params"]["extra"] = other["key"]
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, other)
    # the latest is whole, so nothing falls back
    assert str(error.value) == (
        f"{tmp_path}/00000002: does not fit the state asked for:"
        " params/blocks/0/w: saved float32[16,8], expected float32[16,9];"
        " params/blocks/1/w: saved bfloat16[16,8], expected float32[16,8];"
        " params/extra: saved nothing, expected key<fry>[]"
    )


def test_a_missing_step_lists_those_there(tmp_path):
    save_steps(tmp_path, (10, None), (20, None))
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; available: 10, 20"):
        read(tmp_path, 15)
    assert_bit_equal(read(tmp_path, 10).state, make_state(10))


@pytest.mark.parametrize(
    ("keep", "values", "left"),
    [
        (2, [(1, None), (2, None), (3, None)], [2, 3]),
        # the best one is early and outlives the others
        (2, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 2.5), (5, 2.6)], [1, 4, 5]),
        (1, [(1, 3.0), (2, 2.0), (3, 2.5), (4, 2.4)], [2, 4]),
        (1, [(1, 3.0), (2, None), (3, None)], [1, 3]),
        (2, [(1, 3.0), (2, 2.0), (3, 1.0)], [2, 3]),
        (1, [(1, 2.0), (2, 2.0)], [1, 2]),  # of equals the earliest
    ],
)
def test_retention_keeps_the_newest_and_the_best(tmp_path, keep, values, left):
    save_steps(tmp_path, *values, keep=keep)
    assert steps(tmp_path) == left
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{s:08d}{suffix}" for s in left for suffix in ("", ".json")
    }


def test_saves_inside_a_series_of_skipped_steps_replace_no_other(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step, in_a_row in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 0)):
            checkpointer.save(step, make_state(step), {"skipped_in_a_row": in_a_row})
            checkpointer.wait()
            if in_a_row:
                assert steps(tmp_path) == [1, 2, step]
    assert steps(tmp_path) == [2, 5]


def test_a_step_that_is_read_stays_until_a_later_save(tmp_path):
    save_steps(tmp_path, (1, None), keep=1)
    with reading(tmp_path, 1), reading(tmp_path, 1):
        save_steps(tmp_path, (2, None), keep=1)
        assert steps(tmp_path) == [1, 2]
    before = record_path(tmp_path, 2).stat()
    assert not is_read(tmp_path, 2) and record_path(tmp_path, 2).stat() == before
    save_steps(tmp_path, (3, None), keep=1)
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("where", ["verified_record", "_load"])
def test_a_step_that_a_training_deletes_meanwhile_is_chosen_again(tmp_path, monkeypatch, where):
    save_steps(tmp_path, (1, None), keep=1)
    original = getattr(checkpoint, where)

    def pruned(*arguments):
        monkeypatch.setattr(checkpoint, where, original)
        with monkeypatch.context() as patch:  # as on a file system without locks
            patch.setattr(checkpoint, "is_read", lambda *_: False)
            save_steps(tmp_path, (2, None), keep=1)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, where, pruned)
    found = read(tmp_path)
    assert found.step == 2
    assert_bit_equal(found.state, make_state(2))


def test_the_old_step_stays_until_the_new_one_has_its_record(tmp_path, monkeypatch):
    save_steps(tmp_path, (1, None), keep=1)
    seen = []
    write = checkpoint.write_text_atomic

    def watching(path, text):
        seen.append(read(tmp_path).step)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text_atomic", watching)
    save_steps(tmp_path, (2, None), keep=1)
    assert seen == [1] and steps(tmp_path) == [2]


def test_saving_returns_before_the_write_ends_and_donation_does_not_reach_it(tmp_path, monkeypatch):
    size = 4_000_000
    w = jnp.arange(size, dtype=jnp.float32)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0).lower(w).compile()
    training_went_on, write = threading.Event(), checkpoint.write_text_atomic

    def write_later(path, text):
        assert training_went_on.wait(timeout=60)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text_atomic", write_later)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"params": w}, {})
        for _ in range(3):
            w = overwrite(w)
        assert float(w[-1]) == -1
        assert steps(tmp_path) == []
        training_went_on.set()
        checkpointer.wait()
        assert steps(tmp_path) == [1]
    restored = restore_parts(tmp_path, {"params": jax.ShapeDtypeStruct((size,), jnp.float32)})
    np.testing.assert_array_equal(restored.state["params"], np.arange(size, dtype=np.float32))


# ---------------------------------------- damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    save_steps(directory, (1, None), (2, None))
    return directory


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def files_of(directory: Path, step: int) -> list[Path]:
    folder = directory / f"{step:08d}"
    return [*sorted(p for p in folder.rglob("*") if p.is_file()), directory / f"{step:08d}.json"]


def test_a_flipped_byte_in_any_file_falls_back_and_is_said(two_steps, caplog):
    files = [path for path in files_of(two_steps, 2) if path.stat().st_size]
    assert len(files) >= 6
    for path in files:
        whole = path.read_bytes()
        flip(path, len(whole) // 2)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sngpt_jax"):
            restored = read(two_steps)
        assert restored.step == 1, path
        assert_bit_equal(restored.state, make_state(1))
        (warning,) = caplog.messages
        assert all(x in warning for x in (path.name, "00000002", "taking", "00000001 instead"))
        with pytest.raises(CheckpointError, match="damaged"):
            read(two_steps, 2)  # asked for, so nothing takes its place
        path.write_bytes(whole)
    assert read(two_steps).step == 2


def test_a_missing_file_falls_back(two_steps, tmp_path, caplog):
    for i, path in enumerate(files_of(two_steps, 2)):
        directory = shutil.copytree(two_steps, tmp_path / str(i))
        (directory / path.relative_to(two_steps)).unlink()
        assert read(directory).step == 1
        assert path.name in caplog.messages[-1]
    shutil.rmtree(directory / "00000002")
    assert read(directory).step == 1


@given(data=st.data())
def test_no_changed_byte_of_a_record_changes_what_it_says(two_steps, data):
    path = two_steps / "00000002.json"
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[position] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(changed)
        try:
            record = checkpoint.read_record(two_steps, 2)
        except CheckpointError:
            assert changed != whole
        else:
            assert checkpoint.record_text(record).encode() == whole
    finally:
        path.write_bytes(whole)


def test_all_broken_lists_them_all(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "copy")
    flip(directory / "00000002" / "_CHECKPOINT_METADATA", 3)
    (directory / "00000001.json").unlink()
    with pytest.raises(CheckpointError) as error:
        read(directory)
    message = str(error.value)
    assert "\n" not in message and "00000002: _CHECKPOINT_METADATA is damaged" in message
    unfinished = "00000001: unfinished, it has no record 00000001.json; "
    assert f"{unfinished}delete {directory} to start over" in message
    with pytest.raises(CheckpointError, match=f"{unfinished}choose another step"):
        read(directory, 1)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"a": 1}', b"\0" * 10])
def test_files_that_orbax_cannot_make_out_are_one_line(two_steps, tmp_path, content):
    """With their hashes in the record, so that somebody has made them so."""
    directory = shutil.copytree(two_steps, tmp_path / "copy")
    for path in files_of(directory, 2)[:-1]:
        path.write_bytes(content)
    hashes = checkpoint.hash_files(directory / "00000002")
    record = dataclasses.replace(checkpoint.read_record(directory, 2), files=hashes)
    (directory / "00000002.json").write_text(checkpoint.record_text(record))
    with pytest.raises(CheckpointError, match="00000002: cannot be read: ") as error:
        read(directory, 2)
    assert "\n" not in str(error.value)


def test_a_first_save_that_was_never_finished_is_no_checkpoint(two_steps, tmp_path, caplog):
    """The run may start anew, reach the same step or another, and save it."""
    for next_step in (1, 2, 3):
        directory = shutil.copytree(two_steps, tmp_path / str(next_step))
        shutil.rmtree(directory / "00000001")
        for record in directory.glob("*.json"):
            record.unlink()
        caplog.clear()
        assert read(directory) is None
        (warning,) = caplog.messages
        assert f"{directory}/00000002: unfinished" in warning and "no other" in warning
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            restore_parts(directory, {"params": abstract(make_state(0)["params"])})
        save_steps(directory, (next_step, None), keep=2)
        names = sorted(p.name for p in directory.iterdir())
        assert names == [f"{next_step:08d}", f"{next_step:08d}.json"]
        assert_bit_equal(read(directory).state, make_state(next_step))


def test_a_run_goes_on_over_a_broken_step(two_steps, tmp_path):
    """The broken newest step does not count as the one to keep, and is written anew."""
    for next_step in (2, 3):
        directory = shutil.copytree(two_steps, tmp_path / str(next_step))
        flip(directory / "00000002" / "state" / "_METADATA", 3)
        save_steps(directory, (next_step, None), keep=1)
        assert steps(directory) == [next_step]
        assert_bit_equal(read(directory).state, make_state(next_step))
    directory = shutil.copytree(two_steps, tmp_path / "given_up")
    shutil.copytree(directory / "00000002", directory / "00000009")
    save_steps(directory, (3, None), keep=1)
    assert sorted(p.name for p in directory.iterdir()) == ["00000003", "00000003.json"]


def test_a_whole_step_gets_a_new_record_and_keeps_its_arrays(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "copy")
    written = [path.stat().st_mtime_ns for path in files_of(directory, 2)[:-1]]
    with Checkpointer(directory, keep=1) as checkpointer:
        checkpointer.save(2, make_state(2), {"elapsed": 1.5}, value=0.5)
        checkpointer.save(2, make_state(2), {"elapsed": 2.5})  # without a value of its own
    restored = read(directory)
    assert (restored.step, restored.extra) == (2, {"elapsed": 2.5})
    assert recorded_value(directory, 2) == 0.5
    assert_bit_equal(restored.state, make_state(2))
    assert [path.stat().st_mtime_ns for path in files_of(directory, 2)[:-1]] == written
    assert steps(directory) == [2]


# ---------------------------------------- failures


def test_an_unusable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="checkpoints"):  # the edge's line
        Checkpointer(tmp_path / "file" / "checkpoints", keep=1)
    directory = tmp_path / "gone"
    with Checkpointer(directory, keep=1) as checkpointer:
        shutil.rmtree(directory)
        directory.write_text("now a file")
        with pytest.raises(CheckpointError, match="could not be saved"):
            checkpointer.save(1, make_state(1), {})


def test_an_error_under_way_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, caplog):
    """Such a process ends at once: threads that still work on the save would keep it."""

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text_atomic", full)
    said = "00000001: the checkpoint could not be saved: .*No space left"
    with pytest.raises(CheckpointError, match=said) as failed:
        save_steps(tmp_path, (1, None))
    with pytest.raises(UserError, match="another") as error, Checkpointer(tmp_path, keep=1) as c:
        c.save(2, make_state(2), {})
        raise UserError("another")
    assert "No space left" in caplog.text
    assert failed.value.at_once and error.value.at_once and not UserError("a third").at_once


def test_too_many_open_files_have_their_own_remedy(tmp_path, monkeypatch):
    def refused(path, text):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(checkpoint, "write_text_atomic", refused)
    with pytest.raises(CheckpointError, match="Too many open files; raise ulimit -n, then start"):
        save_steps(tmp_path, (1, None))


def test_check_says_that_a_save_has_failed_and_never_waits_for_one(tmp_path, monkeypatch):
    disk_is_full = threading.Event()

    def full(path, text):
        assert disk_is_full.wait(timeout=60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text_atomic", full)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.check()  # nothing to check yet
        checkpointer.save(1, make_state(1), {})
        checkpointer.check()  # would wait a minute if it waited
        disk_is_full.set()
        said = "No space left on device; free space .*, then start again: the run resumes"
        with pytest.raises(CheckpointError, match=said):
            check_for_a_minute(checkpointer)
        checkpointer.check()  # said once
        monkeypatch.undo()
        checkpointer.save(2, make_state(2), {})
        checkpointer.wait()
        checkpointer.check()
    assert steps(tmp_path) == [2]


def check_for_a_minute(checkpointer: Checkpointer) -> None:
    for _ in range(6000):
        checkpointer.check()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "bad",
    [{"extra": {"x": float("nan")}}, {"extra": {"x": object()}}, {"extra": {}, "value": np.inf}],
)
def test_values_that_json_cannot_hold_are_refused_at_once(tmp_path, bad):
    with Checkpointer(tmp_path, keep=1) as checkpointer, pytest.raises((ValueError, TypeError)):
        checkpointer.save(1, make_state(1), **bad)


def test_another_sharding(tmp_path):
    devices = np.array(jax.devices())
    eight, two = Mesh(devices, ("fsdp",)), Mesh(devices[:2], ("fsdp",))
    state = make_state(5)["params"]["blocks"][0] | {"key": jax.random.key(5)}
    specs = {"w": P("fsdp"), "key": P()}
    placed = jax.device_put(state, {n: NamedSharding(eight, spec) for n, spec in specs.items()})
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"params": placed}, {})
    targets = {name: abstract(x, NamedSharding(two, specs[name])) for name, x in state.items()}
    restored = restore_parts(tmp_path, {"params": targets}).state["params"]
    assert_bit_equal(restored, state)
    assert restored["w"].sharding == NamedSharding(two, P("fsdp"))
    assert len(restored["w"].addressable_shards) == 2


@pytest.mark.parametrize("record", [None, "{}"], ids=["killed", "damaged"])
def test_orbax_finds_nothing_to_overwrite(record, tmp_path, monkeypatch):
    """Several processes would look for the old folder by themselves, and could disagree."""
    (tmp_path / "00000001").mkdir()
    (tmp_path / "00000001" / "old").touch()
    if record:
        (tmp_path / "00000001.json").write_text(record)
    save, found = checkpoint.ocp.save_async, []

    def look(folder, *arguments, **options):
        found.append((sorted(path.name for path in tmp_path.iterdir()), options))
        return save(folder, *arguments, **options)

    monkeypatch.setattr(checkpoint.ocp, "save_async", look)
    state = make_state(1)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, {})
    assert found == [([], {})]
    assert_bit_equal(restore(tmp_path, abstract(state)).state, state)
