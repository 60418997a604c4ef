"""Names that files give lead nowhere else."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base import untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256, inside, problem_of_name, read_bytes

ABOVE = ("", ".", "..", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", "/", "//host/x")
ODD = ("\\x", "a\\..\\x", "C:x", "c:/x", "a\0b", "a\nb", "\x7f", "x" * 1001)


@pytest.mark.parametrize("name", [*ABOVE, *ODD])
def test_names_that_lead_elsewhere_are_refused_in_one_line(name, tmp_path):
    with pytest.raises(UserError) as caught:
        inside(tmp_path, name, UserError)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}: names the file ") and "\n" not in line


@given(st.text() | st.lists(st.sampled_from(["..", ".", "a", "", "\\", "C:"])).map("/".join))
def test_what_is_not_refused_lies_below(name):
    if not problem_of_name(name):
        assert os.path.normpath(f"/folder/{name}").startswith("/folder/")


def test_links_may_stay_inside_and_not_lead_out(tmp_path):
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("x")
    (folder / "real").write_text("y")
    (folder / "link").symlink_to("real")
    (folder / "out").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (tmp_path / "other").symlink_to(folder)
    assert inside(folder, "link", UserError).read_text() == "y"
    # the folder itself may be a link
    assert inside(tmp_path / "other", "real", UserError).read_text() == "y"
    assert not inside(folder, "sub/missing", UserError).exists()
    for name in ("out", "up/secret", "up"):
        with pytest.raises(UserError, match="a link that leads out of"):
            inside(folder, name, UserError)
    with pytest.raises(UserError, match="loop"):
        inside(folder, "loop", UserError)


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, path in (("pipe", tmp_path), (tmp_path.name, tmp_path.parent)):
        with pytest.raises(UserError, match="not a plain file"):
            inside(path, name, UserError)
    for read, limit in ((read_bytes, [10]), (file_sha256, [])):
        with pytest.raises(UserError, match="not a plain file"):
            read(tmp_path / "pipe", *limit, UserError)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "file", 10, UserError) == b"0123456789"
    with pytest.raises(UserError, match="file: 10 bytes; no file of its kind has more than 9"):
        read_bytes(tmp_path / "file", 9, UserError)
    with pytest.raises(UserError, match="missing: cannot be read: No such file"):
        read_bytes(tmp_path / "missing", 9, UserError)


def test_a_file_that_is_replaced_by_a_longer_one_meanwhile_is_read_whole(tmp_path, monkeypatch):
    path, longer = tmp_path / "progress.json", b'{"shards": 12}'
    path.write_bytes(b"{}")
    monkeypatch.setattr(untrusted, "plain_size", lambda path, error: path.write_bytes(longer))
    assert read_bytes(path, 1000, UserError) == longer
