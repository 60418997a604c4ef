"""Training steps of small models. A process compiles each of them once."""

import functools

import jax
import numpy as np

from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.optim.schedules import StepControls
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.training.step import make_train_step


def controls(rate=1.0, adam=None, swa=False, qat=False):
    """The host's decisions; `adam` is Adam's multiplier where it differs from Muon's `rate`."""
    rates = np.float32([rate, rate if adam is None else adam])
    return StepControls(*rates, *np.bool_([swa, qat]))


def host_batch(seed=0, vocab=97, shape=(16, 16)):
    """Random tokens, with those that follow them."""
    B, T = shape
    tokens = np.random.default_rng(seed).integers(0, vocab, (B, T + 1)).astype(np.uint16)
    return {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}


def as_int32(batch):
    return {name: jax.numpy.asarray(rows, np.int32) for name, rows in batch.items()}


@functools.cache
def shapes(config, devices=1, fsdp=1):
    return Shapes.of(config, make_mesh(jax.devices()[:devices], fsdp))


@functools.cache
def program(config, devices=1, fsdp=1):
    """The jitted step."""
    return make_train_step(shapes(config, devices, fsdp))


@functools.cache
def _first(config, devices, fsdp):
    return init_state(shapes(config, devices, fsdp))


def begin(config, devices=1, fsdp=1):
    """The state before the first step. It is a copy, since a step overwrites what it takes."""
    copied = functools.partial(jax.device_put, may_alias=False)
    return jax.tree.map(lambda x: copied(x, x.sharding), _first(config, devices, fsdp))


def take(config, state, batch, *, devices=1, fsdp=1, microbatches=1, **decisions):
    """The state and the metrics after one more step."""
    mesh = shapes(config, devices, fsdp).mesh
    placed = batch_placer(mesh, microbatches)(batch)
    state, metrics = program(config, devices, fsdp)(state, placed, controls(**decisions))
    return state, {name: value.item() for name, value in metrics.items()}


def run(config, steps, devices=1, fsdp=1, microbatches=1):
    """The state after so many steps from the start, and the metrics of each."""
    state, seen = begin(config, devices, fsdp), []
    layout = {"devices": devices, "fsdp": fsdp, "microbatches": microbatches}
    for i in range(steps):
        state, metrics = take(config, state, host_batch(i), **layout)
        seen.append(metrics)
    return state, seen


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(jax.device_get(leaf), np.float64), tree)
