"""The speed of scoring a model: `python -m sngpt_jax.bench scoring --config C --data.dir DIR`.

It compares scoring in windows with the plain forward pass over the same batches. Both speeds are
forward tokens per second, which count every input of a window. It also times the n-gram caches
alone on the training shards, in targets per second on one core, and prints the mass of their
probabilities. The weights are the initial ones of the recipe.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import harness
from sngpt_jax.bench.arguments import ScoringArguments
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, make_mesh
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset, open_dataset
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.ngram import score as ngram_score
from sngpt_jax.evaluation.ngram.cache import Cache, Chunk, Mode
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, window_batches
from sngpt_jax.model.forward import Variables, hidden
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.training.state import Shapes, init_state

CHUNK_TARGETS = 2**16  # targets that a cache scores at a time
CACHE_MEMORY = 4 * 2**30  # bytes that a cache may take


def forward_speeds(
    config: Config, dataset: Dataset, stride: int, batches: int, repeats: int
) -> dict[str, float]:
    """The median forward tokens per second of both passes over standard and over sliding windows.

    The plain pass takes batches that lie on the device. Scoring goes from the stream to the score.
    """
    mesh, T, most = make_mesh(), config.data.seq_len, config.eval.device_batch_tokens
    variables = init_state(Shapes.of(config, mesh)).variables()
    token_bytes, step = dataset.tokenizer.token_bytes(), make_eval_step(config.model, mesh)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(BATCH_AXES)),
        out_specs=P(BATCH_AXES),
        check_vma=False,
    )
    def plain(variables: Variables, inputs_BT: jax.Array) -> jax.Array:
        x_BTD = hidden(config.model)(variables, inputs_BT.astype(jnp.int32))
        # A number per row keeps the compiler from omitting any of the work.
        return jnp.sum(x_BTD, axis=(1, 2), dtype=jnp.float32)

    def forward(inputs: jax.Array, count: int) -> None:
        jax.block_until_ready([plain(variables, inputs) for _ in range(count)])

    def score(windows: Windows) -> None:
        Pass(variables, step, dataset.val, token_bytes, mesh, windows, most).score()

    def speed(tokens: int, work: Callable[..., None], *arguments: Any) -> float:
        return tokens / harness.timed(partial(work, *arguments))[1]

    works: dict[str, Callable[[], float]] = {}
    for name, S in (("standard", T), ("sliding", stride)):
        rows = max(1, most // T) * mesh.devices.size
        targets = min(len(dataset.val) - 1, T + (batches * rows - -(-T // S)) * S)
        windows = Windows(max(targets, T), T, S)
        rows = rows_at_a_time(windows, most, mesh.devices.size)
        batch = next(window_batches(dataset.val, windows, rows)).arrays["inputs"]
        inputs = batch_placer(mesh)({"inputs": batch})["inputs"]
        count = -(-windows.num_rows // rows)
        works[f"forward_{name}"] = partial(speed, count * rows * T, forward, inputs, count)
        works[f"score_{name}"] = partial(speed, windows.num_rows * T, score, windows)
    found = harness.in_turn(works, repeats + 1)  # the first round compiles
    return {name: harness.quartiles(speeds[1:])[1] for name, speeds in found.items()}


def score_chunks(cache: Cache, targets: np.ndarray, model: Sequence[np.ndarray]) -> list[Chunk]:
    """The chunks that `cache` scored. `model` holds the nll, entropy, mass and hint_nll."""
    chunks = []
    for first in range(0, len(targets), CHUNK_TARGETS):
        part = slice(first, first + CHUNK_TARGETS)
        nll, entropy, mass, hint_nll = (readings[part] for readings in model)
        chunk = Chunk(targets[part], nll, entropy, mass)
        if cache.hints:
            chunk = chunk._replace(hints=cache.hints(targets[part]), hint_nll=hint_nll)
        chunks.append(chunk)
        cache.score(chunk)
    return chunks


def cache_results(new: Callable[[Mode], Cache], targets: np.ndarray) -> dict[str, dict[str, Any]]:
    """Each n-gram cache's targets per second and mass, beside a model with drawn readings."""
    rng, count = np.random.default_rng(0), len(targets)
    nll, entropy, hint_nll = (rng.gamma(2.0, 1.5, count).astype(np.float32) for _ in range(3))
    model = nll, entropy, np.ones(count, np.float32), hint_nll
    results: dict[str, dict[str, Any]] = {}
    for mode in get_args(Mode):
        cache = new(mode)
        ngram_score.warm_up(cache)
        chunks, seconds = harness.timed(partial(score_chunks, cache, targets, model))
        del cache  # so that there are never two caches in memory
        mass = ngram_score.mass(new(mode), chunks, progress_reporter(f"mass of {mode}"))
        results[mode] = {"targets_per_s": count / seconds, "mass": mass._asdict()}
    return results


def measure(arguments: ScoringArguments, say: harness.Say) -> dict[str, Any]:
    """The speeds of scoring and of the plain forward pass, and the results of the caches."""
    config, T = arguments.overrides, arguments.overrides.data.seq_len
    if arguments.cache_targets < 0:
        raise UserError("--cache-targets must be 0 or more")
    stride = min(64, T) if arguments.stride is None else arguments.stride
    if not 1 <= stride <= T:
        raise UserError(f"--stride {stride} is not between 1 and data.seq_len = {T}")
    vocab_size, folder = config.model.vocab_size, config.data.dir
    dataset = open_dataset(Path(folder), vocab_size)
    if len(dataset.val) <= T:
        raise UserError(f"{folder}: {len(dataset.val)} validation tokens are less than one window")
    tokens = dataset.train.take(0, min(arguments.cache_targets + 1, len(dataset.train)))
    targets, caches = len(tokens) - 1, {}
    if targets:
        new = partial(
            ngram_score.make_cache,
            first_token=int(tokens[0]),
            vocab_size=vocab_size,
            windows=Windows(targets, T, stride),
            memory=CACHE_MEMORY,
        )
        caches = cache_results(new, tokens[1:])
    speeds = forward_speeds(config, dataset, stride, arguments.batches, arguments.repeats)
    kinds = ("standard", "sliding")
    shares = {kind: speeds[f"score_{kind}"] / speeds[f"forward_{kind}"] for kind in kinds}
    result = harness.environment() | {
        "forward_tok_per_s": speeds,
        "share_of_forward": shares,
        "cache_targets": targets,
        "caches": caches,
    }
    say(f"{result['devices']} x {result['device']}, windows of {T}, stride {stride}")
    for kind, share in shares.items():
        plain = f"{share:.3f} of the plain forward pass's {speeds[f'forward_{kind}']:,.0f}"
        say(f"{kind:9} {speeds[f'score_{kind}']:>12,.0f} forward tok/s, {plain}")
    for mode, found in caches.items():
        mass = "mass {mean:.6g} ({min:.6g} to {max:.6g})".format(**found["mass"])
        say(f"{mode:9} {found['targets_per_s']:>12,.0f} targets/s on one core, {mass}")
    return result
