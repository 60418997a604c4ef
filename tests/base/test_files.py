"""Files that a user names for output: plain ones, links, pipes, devices, and the shell's own."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable, write_bytes_atomic, write_text_atomic


def test_plain_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "out.json"
    write_text_atomic(path, "old")
    before = path.stat().st_ino
    write_text_atomic(path, "é")
    assert path.read_bytes() == "é".encode() and path.stat().st_ino != before
    assert os.listdir(path.parent) == ["out.json"]


@pytest.mark.parametrize("exists", [True, False])
def test_link_is_followed(tmp_path, exists):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(os.path.join("elsewhere", "target"))
    check_writable(link, "--out")
    write_text_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()


def test_pipe_takes_the_bytes_and_stays(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_writable(pipe, "--out")
    thread = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    thread.start()
    write_bytes_atomic(pipe, b"content")
    thread.join(10)
    assert read == [b"content"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_pipe_whose_reader_goes_is_one_line(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_RDONLY)))
    thread.start()
    with pytest.raises(UserError, match="pipe: its reader closed the pipe before it had"):
        write_bytes_atomic(pipe, bytes(10**6))
    thread.join(10)


def test_full_device_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_bytes_atomic(Path("/dev/full"), b"content")


def test_device_stays_a_device(tmp_path):
    """A terminal, which needs no rights that /dev/null does not."""
    master, slave = os.openpty()
    try:
        node = Path(os.ttyname(slave))
        link = tmp_path / "link"
        link.symlink_to(node)
        for path in (node, link):
            check_writable(path, "--out")
            write_bytes_atomic(path, b"content")
            assert os.read(master, 100) == b"content"
        assert stat.S_ISCHR(node.stat().st_mode) and link.is_symlink()
    finally:
        os.close(slave)
        os.close(master)


@pytest.mark.parametrize("linked", [False, True])
def test_redirected_output_keeps_its_other_lines(tmp_path, linked):
    (tmp_path / "link").symlink_to("/dev/stdout")
    path = tmp_path / "link" if linked else "/dev/stdout"
    code = (
        "from pathlib import Path; from sngpt_jax.base.files import write_text_atomic as write;"
        f"print('before', flush=True); write(Path('{path}'), 'middle\\n'); print('after')"
    )
    with open(tmp_path / "log", "wb") as log:  # as the shell's >
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text().split() == ["before", "middle", "after"]
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert piped.stdout.split() == [b"before", b"middle", b"after"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="--out .*it is a folder"):
        check_writable(tmp_path, "--out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*cannot be written"):
        check_writable(tmp_path / "file" / "below", "--out")
