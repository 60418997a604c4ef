"""The command: pages written, pages served, and mistakes as one line."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import threading
from contextlib import closing

import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.report.__main__ import main
from sngpt_jax.report.live import LiveRuns, make_server
from tests import fake_run, tiny_run


def test_a_page_is_written(tmp_path, capsys):
    directories = [str(fake_run.make(tmp_path / name)) for name in "ab"]
    assert main([*directories, directories[0], "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"2 runs: {tmp_path / 'new' / 'page.html'}\n"
    html = (tmp_path / "new" / "page.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert [run["name"] for run in data["runs"]] == ["a", "b"] and data["live"] == ""
    assert "connect-src" not in html
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)


def test_mistakes_are_one_line(tmp_path):
    run = str(fake_run.make(tmp_path / "run"))
    out = ["--out", str(tmp_path / "page.html")]
    for arguments, message in [
        (["--out", "page.html"], "no run to report on"),
        ([run], "--out names no page"),
        ([str(tmp_path), *out], "not a run directory"),
        ([run, "--out", str(tmp_path)], r"--out .*cannot be written: it is a folder"),
        ([run, "--out", "/proc/page.html"], r"--out .*cannot be written"),
        ([run, "--live", "--port", "99999"], "--port 99999: cannot be listened on: no such port"),
        ([str(tmp_path), "--live"], "not a run directory"),
    ]:
        with pytest.raises(UserError, match=message):
            main(arguments)
    assert not (tmp_path / "page.html").exists()


@pytest.fixture
def served(tmp_path):
    """A run that goes on, and a function that asks the server about it."""
    directory = fake_run.make(tmp_path / "run", finished=False)
    with make_server(LiveRuns([directory]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def ask(path, host="localhost:1"):
            port = server.server_address[1]
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", path, headers={"Host": host})
                answer = connection.getresponse()
                return answer.status, answer.read().decode()

        yield directory, ask, server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_page_is_served_and_follows_the_run(served):
    directory, ask, _ = served
    status, html = ask("/")
    assert status == 200 and "connect-src 'self'" in html
    status, text = ask("/data.json")
    data = json.loads(text)
    assert status == 200
    since = f"/data.json?since={data['live']}"
    assert ask(since) == (204, "")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train_loss": 1.0}\n{"step": 42, "tr')
    status, text = ask(since)
    data = json.loads(text)
    steps, values = (data["numbers"][i] for i in data["runs"][0]["curves"]["train_loss"]["raw"])
    assert (status, steps[-1], values[-1]) == (200, 41, 1)


def test_a_run_without_metrics_is_waited_for(tmp_path):
    directory = fake_run.make(tmp_path / "run", finished=False)
    metrics = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").unlink()
    runs = LiveRuns([directory])
    assert runs.data()["metrics"] == []
    (directory / "metrics.jsonl").write_text(metrics)
    assert "train_loss" in runs.data()["runs"][0]["curves"]


def test_only_this_machine_is_answered(served):
    directory, ask, port = served
    for host in ("127.0.0.1:5", "localhost", "[::1]:80"):
        assert ask("/", host=host)[0] == 200
    for host in ("evil.example:8631", "localhost.evil.example"):
        assert ask("/data.json", host=host)[0] == 403
    assert ask("/config.json")[0] == ask("/../../etc/passwd")[0] == 404
    (directory / "config.json").write_text("{")
    status, text = ask("/data.json")
    assert status == 503 and "cannot be read as JSON" in text
    message = f"--port {port}: cannot be listened on: Address already in use; give another"
    with pytest.raises(UserError, match=message):
        make_server(LiveRuns([directory]), port)


def test_odd_requests_and_browsers_that_have_gone_are_no_errors(served, capsys):
    _, ask, port = served
    assert ask("http://[x")[0] == 404
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            # closed by a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert ask("/")[0] == 200
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_ctrl_c_ends_the_server_and_writes_the_page(tmp_path):
    directory, out = fake_run.make(tmp_path / "run"), tmp_path / "page.html"
    process = tiny_run.start("report", directory, "--live", "--port", 0, "--out", out)
    try:
        assert re.fullmatch(r"http://localhost:\d+/ until Ctrl-C\n", process.stdout.readline())
        assert not out.exists()
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    except (AssertionError, subprocess.TimeoutExpired):
        process.kill()
        raise
    assert process.returncode == 130 and said == "interrupted\n"
    assert printed == f"1 run: {out}\n"
    assert '"live":""' in out.read_text() and "connect-src" not in out.read_text()
