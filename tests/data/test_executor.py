"""`prepare --executor`: the files of `prepare`, from two workers and from jobs of a fake Slurm."""

import contextlib
import fcntl
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from sngpt_jax.data import encode
from sngpt_jax.data import parts as parts_module
from sngpt_jax.data import preparation as prepare_module
from sngpt_jax.data.corpus import documents
from sngpt_jax.data.manifest import load_journal
from sngpt_jax.data.parts import Parts
from sngpt_jax.data.preparation import prepare, prepare_on
from sngpt_jax.data.spec import PrepareSpec, command_line, origin_of
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from sngpt_jax.data.writer import PARTS
from sngpt_jax.prepare import main
from tests.data.conftest import contents, refuses, start, wait_until, write_jsonl


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five files, of which the held-out documents take the first and a part of the second."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(5):
        write_jsonl(folder / f"{number}.jsonl", 100, seed=number, longest=80)
    return folder


def kept_documents(source):
    """Training documents whose text no held-out document has."""
    lines = [x for path in sorted(source.iterdir()) for x in path.read_text().splitlines()]
    return sum(line not in lines[:130] for line in lines[130:])


missing = not importlib.util.find_spec("datatrove")
needs_datatrove = pytest.mark.skipif(missing, reason="needs the extra datatrove")


def spec_for(source, out, **changes):
    values = {"val_docs": 130, "vocab_size": 300, "shard_tokens": 4000} | changes
    return PrepareSpec(str(source), str(out), **values)


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """What one process writes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    prepare(spec_for(source, out))
    assert len(list(out.glob("train_*.bin"))) >= 3 and len(list(out.glob("val_*.bin"))) >= 2
    return out


def options(source, out, executor, workers=2):
    more = ["--executor", executor, "--workers", str(workers)]
    return [*command_line(spec_for(source, out)), *more]


def begun(source, out, count=5, **changes):
    """A preparation's parts, stopped before the first was encoded."""
    spec = spec_for(source, out, **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "encoder", interrupt)
        prepare(spec)
    entry = load_journal(out).tokenizer
    return Parts(out / PARTS, spec.source, count, origin_of(spec), out / entry.file, entry)


def interrupt(*_):
    raise KeyboardInterrupt


def shadowed(folder, sitecustomize):
    """An environment whose interpreters run `sitecustomize` first."""
    (folder / "shadow").mkdir()
    (folder / "shadow" / "sitecustomize.py").write_text(sitecustomize)
    path = [str(folder / "shadow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def children_of(group):
    """The processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[2]) == group:
                found.append(stat.parent.name)
    return found


# ---------------------------------------- two workers here


@pytest.mark.full
@pytest.mark.slow
@needs_datatrove
def test_with_a_limit_and_validation_text_of_its_own(source, tmp_path):
    write_jsonl(tmp_path / "val.jsonl", 2)
    changes = {"val_docs": 0, "val_source": str(tmp_path / "val.jsonl"), "max_tokens": 5001}
    one = prepare(spec_for(source, tmp_path / "one", **changes))
    assert prepare_on(spec_for(source, tmp_path / "two", **changes), 2, "local") == one
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
@needs_datatrove
def test_what_a_failed_task_leaves_is_resumed_to_the_files_of_one_process(
    source, plain, tmp_path, capfd
):
    out = tmp_path / "out"
    arguments = options(source, out, "local")
    held = out / ".parts" / "00003-of-00005"
    held.mkdir(parents=True)
    with open(held / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses("another preparation is writing there", main, arguments)
    assert (out / "progress.json").exists() and not (out / "manifest.json").exists()
    # of the three before it, the other worker may be at one still
    assert len({path.parent for path in out.glob(".parts/*/train_*")}) >= 2
    other = spec_for(source, out, shard_tokens=5000)
    refuses("shard_tokens: 4000 there, 5000 asked for", prepare, other)
    capfd.readouterr()
    assert main([*arguments, "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["train"]["documents"] == kept_documents(source)
    assert "datatrove" not in said.err and "Traceback" not in said.err
    assert contents(out) == contents(plain)


@pytest.mark.slow
@pytest.mark.parametrize("encoded", [5, 4])
def test_processes_take_parts_that_are_all_there(source, plain, tmp_path, monkeypatch, encoded):
    parts = begun(source, tmp_path / "out")
    for part in range(encoded):
        parts.encode(part)
    documents, encode_chunk = [], encode._encode

    def counting(tokenizer, name, chunk):
        documents.extend(chunk)
        return encode_chunk(tokenizer, name, chunk)

    monkeypatch.setattr(encode, "_encode", counting)
    prepare(spec_for(source, tmp_path / "out"))
    # the held-out ones are not taken from parts
    assert len(documents) == (130 if encoded == 5 else 500)
    assert contents(tmp_path / "out") == contents(plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "left_out"),
    [({"val_docs": 0, "val_fraction": 0.2}, 20), ({"max_tokens": 2000}, 90)],
)
def test_parts_too_leave_out_what_validation_has(source, tmp_path, monkeypatch, changes, left_out):
    """Where the limit needs more documents than were encoded, the last step encodes them."""
    twice = tmp_path / "twice"
    twice.mkdir()
    for number, file in enumerate((0, 0, 0, 1)):
        text = (source / f"{file}.jsonl").read_text()
        (twice / f"{number}.jsonl").write_text(text)
    changes = {"val_docs": 100, "tokenizer": str(tmp_path / "t.model")} | changes
    train_sentencepiece(
        documents(str(source)), tmp_path / "t.model", vocab_size=300, normalization="identity"
    )
    one = prepare(spec_for(twice, tmp_path / "one", **changes))
    assert one.separation.dropped >= left_out
    monkeypatch.setattr(parts_module, "_SHARD_TOKENS", 1000)
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 500)
    parts = begun(twice, tmp_path / "two", 4, **changes)
    while left := parts.left():
        parts.encode(left[0])
    assert parts.reached(3).finished == (not one.origin.max_tokens)
    assert prepare(spec_for(twice, tmp_path / "two", **changes)) == one
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@needs_datatrove
def test_a_stop_is_not_held_up_by_a_worker_that_was_killed(source, tmp_path):
    from sngpt_jax.data import executor

    def kill_one_and_stop(*_):
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        raise KeyboardInterrupt

    parts = begun(source, tmp_path / "out")
    ended = threading.Event()

    def encode_until_stopped():
        with pytest.raises(KeyboardInterrupt):
            executor.encode_here(parts, 2, kill_one_and_stop)
        ended.set()

    threading.Thread(target=encode_until_stopped, daemon=True).start()  # a hang leaves it behind
    is_ended = ended.wait(60)
    for worker in multiprocessing.active_children():
        worker.kill()
    assert is_ended


@needs_datatrove
def test_a_part_in_work_is_reported(source, tmp_path, monkeypatch):
    from sngpt_jax.data import executor

    parts = replace(begun(source, tmp_path / "out"), count=1)
    seen, saved = threading.Event(), parts_module.save
    notes = []

    def wait_after_a_shard(progress, folder):
        saved(progress, folder)
        if len(progress.train.shards) == 1:
            assert seen.wait(60)

    def report(done, total, note):
        notes.append(note)
        if note == "0 of 1 parts, 1,000 tokens":
            seen.set()

    pool = lambda workers, *_: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(executor, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(executor, "_REPORT_SECONDS", 0.01)
    monkeypatch.setattr(parts_module, "_SHARD_TOKENS", 1000)
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(parts_module, "save", wait_after_a_shard)
    executor.encode_here(parts, 1, report)
    assert notes[-1] == f"1 of 1 parts, {parts.reached(0).tokens:,} tokens"


# Workers tell that they start, and take a second longer for it.
SLOW_START = """
import sys, time
if "--multiprocessing-fork" in sys.orig_argv:
    open({mark!r}, "w").close()
    time.sleep(1)
"""


@pytest.mark.slow
@needs_datatrove
@pytest.mark.parametrize("executor", ["processes", pytest.param("local", marks=pytest.mark.full)])
def test_ctrl_c_while_workers_start_says_one_word(source, tmp_path, executor):
    mark = tmp_path / "mark"
    env = shadowed(tmp_path, SLOW_START.format(mark=str(mark)))
    arguments = options(source, tmp_path / "out", executor)
    with start(*arguments, env=env) as process:
        wait_until(lambda: mark.exists() or process.poll() is not None, 100)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors


# Kills the worker that is about to place the first shard of the third part, once.
SITECUSTOMIZE = """
import os, signal
original = os.replace

def replace(source, target, **options):
    if ".parts/00002-of-00005/train_000000.bin" in str(target) and os.path.exists({mark!r}):
        os.unlink({mark!r})
        os.kill(os.getpid(), signal.SIGKILL)
    return original(source, target, **options)

os.replace = replace
"""


@pytest.mark.full
@pytest.mark.slow
@needs_datatrove
def test_a_killed_worker_ends_the_command_in_one_line(source, plain, tmp_path):
    mark = tmp_path / "mark"
    mark.write_text("")
    env = shadowed(tmp_path, SITECUSTOMIZE.format(mark=str(mark)))
    arguments = options(source, tmp_path / "out", "local")
    with start(*arguments, env=env) as process:
        errors = process.communicate(timeout=100)[1]
    assert process.returncode == 2 and not mark.exists()
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: an encoding process was killed, perhaps for")
    wait_until(lambda: not children_of(process.pid))
    assert main(arguments) == 0
    assert contents(tmp_path / "out") == contents(plain)


# ---------------------------------------- Slurm

# sbatch stores the script and prints a number; srun runs the command after its own options.
SBATCH = """#!/bin/sh
number=$(ls "{jobs}" | grep -c script)
for script; do :; done
cp "$script" "{jobs}/$number.script"
echo "Submitted batch job $((number + 17))"
"""
SRUN = """#!/bin/sh
while [ "$1" != launch_pickled_pipeline ]; do shift; done
exec "$@"
"""
SCONTROL = "#!/bin/sh\necho node1\n"
# Takes one job only, as at the limit of a user's jobs.
FULL_SBATCH = """#!/bin/sh
if [ -e "{jobs}/0.script" ]; then echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1; fi
touch "{jobs}/0.script"
echo "Submitted batch job 17"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of submitted jobs, and a PATH with stand-ins for Slurm's commands."""
    tools, jobs = tmp_path / "tools", tmp_path / "jobs"
    tools.mkdir()
    jobs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text.format(jobs=jobs))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return jobs


def directives(script):
    lines = script.read_text().splitlines()
    words = (line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH"))
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def run_job(script, **env):
    env = os.environ | {"SLURM_NODELIST": "node1", "SLURM_JOB_ID": "17"} | env
    command = ["bash", str(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.full
@pytest.mark.slow
@needs_datatrove
def test_jobs_of_a_cluster_write_the_files_of_one_process(source, plain, tmp_path, cluster, capsys):
    out = tmp_path / "out"
    arguments = options(source, out, "slurm", 3)
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    submitted = {"parts": 5, "array_job": "17", "merge_job": "18"}
    assert summary == {"dir": str(out), "submitted": submitted}
    array, merge = (directives(cluster / f"{number}.script") for number in (0, 1))
    assert array["array"] == "0-4%3" and "dependency" not in array
    assert merge["dependency"] == "afterok:17" and merge["kill-on-invalid-dep"] == "yes"
    assert "array" not in merge
    for job in (array, merge):
        assert job["mem-per-cpu"] == "4G" and job["cpus-per-task"] == "1"
        assert not job.keys() & {"partition", "time", "qos"}
        assert Path(job["output"]).parent.is_dir()

    for task in (4, 0, 2, 1):
        done = run_job(cluster / "0.script", SLURM_ARRAY_TASK_ID=str(task))
        assert done.returncode == 0, done.stderr
    assert not list(out.glob("*.bin"))
    held = out / ".parts" / "00003-of-00005"
    held.mkdir()
    with open(held / ".lock", "w") as file:  # the last task fails
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_job(cluster / "0.script", SLURM_ARRAY_TASK_ID="3")
        assert done.returncode == 1 and "UserError" in done.stderr
        assert "another preparation is writing" in done.stderr
    assert main(arguments) == 0  # the second submission has only the last part
    assert "job 19 encodes 1 parts, then job 20 writes the shards" in capsys.readouterr().out
    assert directives(cluster / "2.script")["array"] == "0-0%3"
    assert run_job(cluster / "2.script", SLURM_ARRAY_TASK_ID="0").returncode == 0
    assert main(arguments) == 0  # nothing to encode
    assert f"{out}: job 21 writes the shards" in capsys.readouterr().out
    assert "dependency" not in directives(cluster / "4.script")
    done = run_job(cluster / "3.script")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(plain)
    assert main([*arguments, "--json"]) == 0  # finished: nothing is submitted
    assert json.loads(capsys.readouterr().out)["train"]["documents"] == kept_documents(source)
    assert len(list(cluster.glob("*.script"))) == 5


@needs_datatrove
def test_refusals_of_a_cluster_are_one_line(source, tmp_path, cluster):
    sbatch = cluster.parent / "tools" / "sbatch"
    status = "sbatch failed with status {}; see its message above"
    queued = "job 17 is in the queue: scancel 17 and run this again"
    for script, message in (
        ("#!/bin/sh\nexit 3\n", status.format(3)),
        (FULL_SBATCH.format(jobs=cluster), f"{status.format(1)}; {queued}"),
        (None, "no sbatch here; run it on a machine of the cluster"),
    ):
        sbatch.write_text(script) if script else sbatch.unlink()
        refuses(message, prepare_on, spec_for(source, tmp_path / "out"), 2, "slurm")


@needs_datatrove
@pytest.mark.parametrize("name", ["two words", "a&b", "$HOME"])
def test_a_path_that_a_job_cannot_name_is_refused_before_anything_is_done(
    source, tmp_path, cluster, name
):
    spec = spec_for(source, tmp_path / name)
    refuses("with --executor slurm its path may not hold", prepare_on, spec, 2, "slurm")
    assert not list(cluster.iterdir()) and not (tmp_path / name / "tokenizer.model").exists()


# ---------------------------------------- what it refuses


@needs_datatrove
def test_too_few_documents_are_known_before_anything_is_encoded(source, tmp_path):
    spec = spec_for(source, tmp_path / "out", val_docs=500)
    refuses("--val-docs 500 leaves none to train on", prepare_on, spec, 2, "local")
    assert not (tmp_path / "out" / ".parts").exists()


def test_published_tokens_and_a_missing_package_are_refused(source, tmp_path, monkeypatch):
    arguments = ["--source", "golf", "--out", str(tmp_path), "--executor", "local"]
    refuses("golf is already tokens; it takes no --executor", main, arguments)
    monkeypatch.setitem(sys.modules, "datatrove", None)  # makes the import fail
    needed = "--executor needs the package datatrove; install it: .* -m pip install datatrove"
    refuses(needed, prepare_on, spec_for(source, tmp_path / "out"), 2, "local")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
