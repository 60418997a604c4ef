"""Every test runs on eight CPU devices, with silent broadcasting between ranks an error.

Programs are compiled without optimizing their machine code: here they take longer to compile than
to run.
"""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

from pathlib import Path

import jax
import pytest
from hypothesis import settings

from tests import tiny_run

tiny_run.heed_signals()
jax.config.update("jax_num_cpu_devices", 8)
inherited = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{inherited} {tiny_run.COMPILE_QUICKLY}"
jax.devices()  # the flags are read here; processes that tests start are not to inherit them
os.environ["XLA_FLAGS"] = inherited
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here and not beside the tests that read it: pytest reads other folders' options too late."""
    parser.addoption("--golden", metavar="DIR", help="folder of golden cases, docs/seeds.md")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that several tests compile are compiled once in a session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sends its log to stderr, where `caplog` of a later test would not see it."""
    loggers = [logging.getLogger(name) for name in ("sngpt_jax", "sngpt_kernels")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of tests/tiny_run.py, with its data prepared."""
    return tiny_run.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_trained(tiny_recipe: Path) -> Path:
    """The run directory of that recipe, trained without interruption on one device by a process of
    its own.
    """
    directory = tiny_recipe.parent / "uninterrupted"
    done = tiny_run.run("train", "--config", tiny_recipe, "--run-dir", directory)
    assert done.returncode == 0, done.stderr
    return directory
