"""Disks that are full and folders that cannot be written."""

import contextlib
import functools
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import kills
from tests.faults.lab import Lab, Row

# bytes of disks on which a training fails: sooner or later
ROOM = ("4k", "12k", "24k", "64k", "300k", "700k", "1300k")


def mounted(folder: Path, *options: str) -> bool:
    """Mounts, or mounts anew, a disk in memory; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(lab: Lab, size: str) -> Iterator[tuple[Path, Callable[[], None], dict[str, object]]]:
    """A folder on a disk of that `size`, what makes room there, and options for the process that
    is to meet it full: a disk in memory, or a limit to the size of files where none can be mounted.
    """
    folder = lab.fresh("disk")
    folder.mkdir()
    if not mounted(folder, "-o", f"size={size}"):
        most = int(size.removesuffix("k")) * 1024 // 4
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
        yield folder, lambda: None, {"preexec_fn": limit}
        return
    try:
        yield folder, lambda: _remount(folder, "size=100m"), {}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def full_in_training(lab: Lab) -> Row:
    """A disk becomes full at the start, in the metrics, in a checkpoint; then there is room."""
    messages: list[str] = []
    rooms = 3 * ROOM if lab.thorough else ROOM[2:3]  # where a write fails is a matter of chance too
    for size in rooms:
        with small_disk(lab, size) as (disk, make_room, limits):
            done = lab.run(lab.training(disk / "run"), **limits)
            assert done.status == 2, (size, done)
            messages.append(done.error)
            make_room()
            lab.goes_on_to_the_same(disk / "run")
    of_checkpoints = [x for x in messages if "the checkpoint could not be saved" in x]
    return Row(
        "full disk during training",
        "The training stops and names the file that it could not write. Once there is room, the"
        " same command resumes from the last finished checkpoint.",
        min(of_checkpoints or messages, key=len),
        "2",
        len(rooms),
    )


def full_for_output(lab: Lab) -> Row:
    """`train … > log` where the log's disk is full."""
    directory = lab.fresh("unheard")
    with open("/dev/full", "w") as full:
        done = lab.run(lab.training(directory), stdout=full)
    assert done.status == 0 and "Traceback" not in done.err, done
    lab.goes_on_to_the_same(directory)
    (said,) = [line for line in done.err.splitlines() if line.startswith("stdout:")]
    return Row(
        "full disk behind stdout",
        "The training continues. `metrics.jsonl` holds the records that could not be printed.",
        said,
        "0",
    )


def full_in_preparation(lab: Lab) -> Row:
    """Shards on a full disk; with room they are those of an undisturbed preparation."""

    undisturbed, sizes = lab.fresh("undisturbed"), ("4k", "16k", "40k")
    assert lab.run(kills.prepare_command(lab, undisturbed)).status == 0
    for size in sizes:
        with small_disk(lab, size) as (disk, make_room, limits):
            command = kills.prepare_command(lab, disk / "data")
            done = lab.run(command, **limits)
            assert done.status == 2 and done.error, (size, done)
            make_room()
            assert lab.run(command).status == 0
            assert kills.contents(disk / "data") == kills.contents(undisturbed)
    return Row(
        "full disk during the preparation of shards",
        "The preparation stops. The same command resumes after the last whole shard and writes the"
        " same bytes.",
        done.error,
        "2",
        len(sizes),
    )


def full_in_export(lab: Lab) -> Row:
    """An export on a full disk leaves nothing there."""
    with small_disk(lab, "32k") as (disk, make_room, limits):
        done = lab.run(kills.export_command(lab, disk), **limits)
        assert done.status == 2, done
        assert not list(disk.iterdir())
        make_room()
        assert lab.run(kills.export_command(lab, disk)).status == 0
    return Row(
        "full disk during an export",
        "The export stops and leaves no partial file.",
        done.error,
        "2",
    )


def unwritable(lab: Lab) -> Row:
    """A run directory that cannot be made, on a read-only disk, or read-only during the run."""
    (lab.folder / "a_file").write_text("")
    done = lab.run(lab.training(lab.folder / "a_file" / "run"))
    assert done.status == 2, done
    message, tried = done.error, 1
    folder = lab.fresh("disk")
    folder.mkdir()
    if mounted(folder):
        try:
            process = lab.start(lab.training(folder / "run"))
            checkpoints = folder / "run" / "checkpoints"
            lab.until((checkpoints / "00000004.json").exists, process)
            # immutable, since open files keep a disk from becoming read-only
            subprocess.run(["chattr", "+i", str(checkpoints)], check=True, capture_output=True)
            done = lab.end(process)
            subprocess.run(["chattr", "-i", str(checkpoints)], check=True)
            assert done.status == 2, done
            message, tried = done.error, tried + 1
            lab.goes_on_to_the_same(folder / "run")
            _remount(folder, "ro")
            done = lab.run(lab.training(folder / "other"))
            assert done.status == 2 and done.error, done
            tried += 1
        except subprocess.CalledProcessError:  # disks in memory may not have this attribute
            lab.end(process)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    return Row(
        "run directory that is read-only from the start, or becomes read-only during the run",
        "The training refuses to start, or stops. The same command resumes once the directory is"
        " writable.",
        message,
        "2",
        tried,
    )
