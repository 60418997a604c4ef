"""Whether the probabilities behind a score sum to 1 over the vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.data.shards import TokenStream
from sngpt_jax.evaluation.audit.check import Check, unmade, verdict
from sngpt_jax.evaluation.step import make_eval_step, on_each_device
from sngpt_jax.model import loss
from sngpt_jax.model.forward import Batch, Variables, graph
from sngpt_jax.model.layers import compute_dtype

WINDOWS = 8  # evenly spaced in the stream
POSITIONS = 32  # of each window, evenly spaced
# The steps of scoring and of the logits round a model's sums in different orders.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
CACHE_TOLERANCE = 1e-3


def make_logits_step(config: ModelConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted function (variables, batch of "inputs" [B, T] and "positions" [B, P]) → the
    logits [B, P, V] at these positions, float32.
    """

    def local(variables: Variables, batch: Batch) -> Any:
        model = nnx.merge(graph(config), variables)
        x_BTD = model.hidden(batch["inputs"].astype(jnp.int32))
        x_BPD = jnp.take_along_axis(x_BTD, batch["positions"][..., None], axis=1)
        table_VD = model.embed.table[...].astype(x_BTD.dtype)
        logits_BPV = loss.logits(x_BPD, table_VD, config.logit_soft_cap)
        return jax.lax.all_gather(logits_BPV, BATCH_AXES, tiled=True)

    return on_each_device(config, mesh, local)


def masses(config: Config, variables: Variables, stream: TokenStream, mesh: Mesh) -> np.ndarray:
    """Σ_v p(v) at sampled positions, float64 [n], for p(v) = e^(l_v - log Z).

    The l are the model's logits. log Z = nll + l_target comes from the nll that scoring gives.
    """
    seq_len, devices = config.data.seq_len, mesh.devices.size
    rows = -(-WINDOWS // devices) * devices
    starts = np.linspace(0, len(stream) - seq_len - 1, rows).astype(np.int64)
    taken = np.stack([stream.take(int(start), seq_len + 1) for start in starts])
    inputs, targets = taken[:, :-1], taken[:, 1:]
    at = np.linspace(0, seq_len - 1, min(POSITIONS, seq_len)).astype(np.int32)
    positions = np.tile(at, (rows, 1))
    place = batch_placer(mesh)
    scored = make_eval_step(config.model, mesh)(
        variables, place({"inputs": inputs, "targets": targets})
    )
    nll = np.take_along_axis(np.asarray(scored["nll"], np.float64), positions, axis=1)
    step = make_logits_step(config.model, mesh)
    found = step(variables, place({"inputs": inputs, "positions": positions}))
    logits = np.asarray(found, np.float64)
    chosen = np.take_along_axis(targets, positions, axis=1)[..., None].astype(np.int64)
    of_target = np.take_along_axis(logits, chosen, axis=-1)
    return np.exp(logits - of_target - nll[..., None]).sum(axis=-1).ravel()


def judge_masses(found: np.ndarray, config: ModelConfig) -> Check:
    """Whether the masses [n] of a model are 1."""
    least, most = float(found.min()), float(found.max())
    within = TOLERANCE[compute_dtype(config).name]
    text = (
        f"the model's sum to {least:.6f} to {most:.6f} at {len(found):,} positions (1 ± {within:g})"
    )
    passed = bool(np.abs(found - 1).max() <= within)
    return verdict("probabilities", passed, text, min=least, max=most, positions=len(found))


def judge_cache(scored: dict[str, Any] | None) -> Check:
    """Whether the mixture of an n-gram cache sums to 1, by the result of `report.score`."""
    name = "with a cache"
    if scored is None:
        return unmade(name, "--ngram names none")
    mass, cache = scored["ngram"]["mass"], scored["ngram"]["cache"]
    text = (
        f"those of {cache} sum to {mass['min']:.6g} to {mass['max']:.6g} at"
        f" {mass['positions']:,} positions (1 ± {CACHE_TOLERANCE:g})"
    )
    passed = max(mass["max"] - 1, 1 - mass["min"]) <= CACHE_TOLERANCE
    return verdict(name, passed, text, cache=cache, **mass)
