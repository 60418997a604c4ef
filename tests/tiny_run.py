"""A run small enough to train inside a test: its data, its recipe, and how to start commands."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config.recipe import load
from sngpt_jax.data.preparation import PrepareSpec, prepare
from sngpt_jax.run import checkpoint
from sngpt_jax.run.metrics import read_metrics
from sngpt_jax.training.state import Shapes, TrainState

ROOT = Path(__file__).parents[1]

# Programs of tests take longer to compile than to run. The second flag, which later versions of jax
# do not know, saves a third of that time.
COMPILE_QUICKLY = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    COMPILE_QUICKLY += " --xla_cpu_use_fusion_emitters=false"

RECIPE = """
from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=320,
        num_layers=2,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=64,
        max_seq_len=32,
    ),
    optim=OptimConfig(
        warmdown_fraction=0.75,
        muon_momentum_warmup_steps=10,
        newton_schulz_dtype="float32",
        ema_decay=0.9,
        swa_every=2,
        swa_below=0.8,  # from step 10, that of the first checkpoint
    ),
    data=DataConfig(dir={data!r}, batch_tokens=2048, seq_len=32),
    train=TrainConfig(
        steps=20,
        device_batch_tokens=64,
        checkpoint_every=10,
        compilation_cache={cache!r},
    ),
    eval=EvalConfig(every=10, tokens=2048, device_batch_tokens=1024),
)
"""


def make(folder: Path) -> Path:
    """Prepares invented text in `folder` and writes the recipe; returns the recipe's path."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    documents = [" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(300)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    spec = PrepareSpec(
        source=str(folder / "text.txt"),
        out=str(folder / "data"),
        val_docs=20,
        vocab_size=320,
        normalization="identity",
    )
    prepare(spec, workers=1)
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE.format(data=str(folder / "data"), cache=str(folder / "cache")))
    return recipe


def heed_signals() -> None:
    """Lets the processes that tests start heed signals which this one was started to ignore: in the
    background of a shell (SIGINT) or by `nohup` (SIGHUP). Children inherit that without a handler.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"sngpt_jax.{name}", *map(str, arguments)]


def environment(devices: int = 1) -> dict[str, str]:
    """The environment for a command on so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {COMPILE_QUICKLY}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run(name: str, *arguments: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        command(name, *arguments),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=300,
    )


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a command on one device."""
    return subprocess.Popen(
        command(name, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], path: Path, containing: str = "") -> None:
    """Until `path` exists and contains that; the process must not end before."""
    try:
        for _ in range(60_000):
            if path.exists() and containing in path.read_text():
                return
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        raise AssertionError(f"{path} did not appear")
    except BaseException:
        process.kill()
        raise


def final_state(directory: Path) -> TrainState:
    """The state after the last step of a run."""
    config = load(str(directory / "config.json"))
    shapes = Shapes.of(config, make_mesh(jax.devices()[:1]))
    restored = checkpoint.restore(directory / "checkpoints", shapes.state)
    assert restored is not None and restored.step == config.train.steps
    return restored.state


def losses(
    directory: Path, names: Sequence[str] = ("train_loss", "val_loss", "val_bpb")
) -> list[tuple[int, str, float]]:
    """(step, name, value) of every loss logged, in order."""
    return [
        (record["step"], name, record[name])
        for record in read_metrics(directory / "metrics.jsonl")
        for name in names
        if name in record
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """Parameters, optimizer state, step, key and logged losses are equal bit for bit."""
    first, second = final_state(a), final_state(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True
    ):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))
    assert losses(a) == losses(b)
