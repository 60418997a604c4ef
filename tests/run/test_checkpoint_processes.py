"""Checkpoints between processes: other devices, SIGKILL at each moment of a save, full disks."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.run.checkpoint import Checkpointer, restore

pytestmark = pytest.mark.slow

CHILD = """
    import os, signal, sys, threading, time
    from pathlib import Path
    import jax, jax.numpy as jnp
    import numpy as np
    from sngpt_jax.run import checkpoint
    from sngpt_jax.run.checkpoint import Checkpointer, restore_parts
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    def params(step):
        return {"w": jnp.arange(1 << 20, dtype=jnp.float32).reshape(1024, 1024) + step}
"""


def start(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # one device
    source = textwrap.dedent(CHILD) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


LARGE = {"params": {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}}


def expected_params(step: int) -> np.ndarray:
    return np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024) + step


def test_another_process_with_another_number_of_devices(tmp_path):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    target = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        w = jax.device_put(expected_params(3), sharding)
        checkpointer.save(3, {"params": {"w": w}, "key": jax.random.key(1)}, {})
    other = """
        assert len(jax.devices()) == 1
        target = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
        found = restore_parts(directory, {"params": target}).state["params"]["w"]
        np.testing.assert_array_equal(found, params(3)["w"])
        with Checkpointer(directory, keep=1) as c:
            c.save(4, {"params": params(4)}, {})
    """
    done = start(other, str(tmp_path), "")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    restored = restore(tmp_path, {"params": target})
    assert restored.step == 4
    assert len(restored.state["params"]["w"].sharding.device_set) == len(jax.devices()) == 8
    np.testing.assert_array_equal(restored.state["params"]["w"], expected_params(4))


KILLED = """
    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    def kill_once_there():
        while not list(directory.glob("00000002.orbax-checkpoint-tmp")):
            pass
        kill()
    with Checkpointer(directory, keep=1) as c:
        if mode == "before the first record":
            checkpoint.write_text_atomic = kill
        c.save(1, {"params": params(1)}, {})
        c.wait()
        if mode == "writing":
            threading.Thread(target=kill_once_there).start()
        elif mode == "in the record":
            os.fsync = kill
        elif mode == "deleting":
            checkpoint.shutil.rmtree = kill
        c.save(2, {"params": params(2)}, {})
"""


@pytest.mark.parametrize(
    ("moment", "step", "warned"),
    [
        ("before the first record", None, True),
        ("writing", 1, False),
        ("in the record", 1, True),
        ("deleting", 2, False),
    ],
)
def test_sigkill_at_any_moment_leaves_what_was_finished(tmp_path, moment, step, warned, caplog):
    done = start(KILLED, str(tmp_path), moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    restored = restore(tmp_path, LARGE)
    assert (restored and restored.step) == step and len(caplog.messages) == warned
    if restored is not None:
        np.testing.assert_array_equal(restored.state["params"]["w"], expected_params(step))

    # the next process of the run clears up and goes on
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]
        checkpointer.save(3, {"params": {"w": jnp.asarray(expected_params(3))}}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000003.json"]


def test_a_full_disk_is_one_line(tmp_path):
    full = """
        import resource
        with Checkpointer(directory, keep=1) as c:
            c.save(1, {"params": params(1)}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            with Checkpointer(directory, keep=1) as c:
                c.save(2, {"params": params(2)}, {})
                for _ in range(6000):  # training goes on
                    time.sleep(0.01)
                    c.check()
                print("check() said nothing")
        except checkpoint.CheckpointError as error:
            print(error)
    """
    done = start(full, str(tmp_path), "")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (line,) = done.stdout.splitlines()
    assert "00000002: the checkpoint could not be saved: " in line and "File too large" in line
    assert json.loads((tmp_path / "00000001.json").read_text())["record"]["step"] == 1
    assert restore(tmp_path, LARGE).step == 1
