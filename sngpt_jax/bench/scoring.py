"""The speed of scoring a model: `python -m sngpt_jax.bench scoring --config C --data.dir DIR`.

It compares scoring in windows with the plain forward pass over the same batches. Both speeds are
forward tokens per second, which count every input of a window. It also times the n-gram caches
alone on the training shards, in targets per second on one core, and prints the mass of their
probabilities. The weights are the initial ones of the recipe.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import harness
from sngpt_jax.bench.arguments import ScoringArguments
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, gather, make_mesh, partition_specs
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset, TokenStream, open_dataset
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.ngram import score as ngram_score
from sngpt_jax.evaluation.ngram.cache import Cache, Chunk, Mode
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, window_batches
from sngpt_jax.model.forward import Variables, abstract_variables, hidden
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.training.state import Shapes, init_state

CHUNK_TARGETS = 2**16  # targets that a cache scores at a time
CACHE_MEMORY = 4 * 2**30  # bytes that a cache may take


def make_forward(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The plain forward pass: (variables, inputs [B, T]) → one number per row [B].

    A number per row keeps the compiler from omitting any of the work, and nothing is read back.
    """
    layout = partition_specs(mesh, abstract_variables(config.model))

    def local(variables: Variables, inputs_BT: jax.Array) -> jax.Array:
        x_BTD = hidden(config.model)(gather(variables, layout), inputs_BT.astype(jnp.int32))
        return jnp.sum(x_BTD, axis=(1, 2), dtype=jnp.float32)

    rows = P(BATCH_AXES)
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(layout, rows), out_specs=rows, check_vma=False)
    )


def forward_works(
    config: Config, dataset: Dataset, stride: int, batches: int
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, forward tokens, work) of both passes over standard and over sliding windows.

    The plain pass takes batches that lie on the device. Scoring goes from the stream to the score.
    """
    mesh, T, most = make_mesh(), config.data.seq_len, config.eval.device_batch_tokens
    variables = init_state(Shapes.of(config, mesh)).variables()
    token_bytes = dataset.tokenizer.token_bytes()
    step, plain = make_eval_step(config.model, mesh), make_forward(config, mesh)
    for name, S in (("standard", T), ("sliding", stride)):
        rows = max(1, most // T) * mesh.devices.size
        targets = min(len(dataset.val) - 1, T + (batches * rows - -(-T // S)) * S)
        windows = Windows(max(targets, T), T, S)
        rows = rows_at_a_time(windows, most, mesh.devices.size)
        batch = next(window_batches(dataset.val, windows, rows)).arrays["inputs"]
        inputs = batch_placer(mesh)({"inputs": batch})["inputs"]
        count = -(-windows.num_rows // rows)

        def forward(inputs: jax.Array = inputs, count: int = count) -> None:
            jax.block_until_ready([plain(variables, inputs) for _ in range(count)])

        def score(windows: Windows = windows) -> None:
            Pass(variables, step, dataset.val, token_bytes, mesh, windows, most).score()

        yield f"forward_{name}", count * rows * T, forward
        yield f"score_{name}", windows.num_rows * T, score


def forward_speeds(
    config: Config, dataset: Dataset, stride: int, batches: int, repeats: int
) -> dict[str, float]:
    """The median forward tokens per second of each of `forward_works`."""
    works = {
        name: (tokens, work)
        for name, tokens, work in forward_works(config, dataset, stride, batches)
    }
    timed = {name: harness.seconds_of(work) for name, (_, work) in works.items()}
    found = harness.in_turn(timed, repeats + 1)  # the first round compiles
    return harness.medians(
        {name: [works[name][0] / seconds for seconds in times[1:]] for name, times in found.items()}
    )


def cache_results(
    stream: TokenStream, vocab_size: int, targets: int, stride: int, seq_len: int
) -> dict[str, dict[str, Any]]:
    """Each n-gram cache's targets per second and mass, beside a model with drawn readings."""
    tokens = stream.take(0, targets + 1)
    rng = np.random.default_rng(0)
    nll, entropy, hint_nll = (rng.gamma(2.0, 1.5, targets).astype(np.float32) for _ in range(3))
    ones = np.ones(targets, np.float32)

    def new(mode: Mode) -> Cache:
        return ngram_score.make_cache(
            mode,
            first_token=int(tokens[0]),
            vocab_size=vocab_size,
            windows=Windows(targets, seq_len, stride),
            memory=CACHE_MEMORY,
        )

    results: dict[str, dict[str, Any]] = {}
    for mode in get_args(Mode):
        cache = new(mode)
        ngram_score.warm_up(cache)
        chunks: list[Chunk] = []

        def score(cache: Cache = cache, chunks: list[Chunk] = chunks) -> None:
            for first in range(0, targets, CHUNK_TARGETS):
                part = slice(first, min(first + CHUNK_TARGETS, targets))
                following = tokens[1:][part]
                chunk = Chunk(following, nll[part], entropy[part], ones[part])
                if cache.hints:
                    hints = cache.hints(following)
                    chunk = chunk._replace(hints=hints, hint_nll=hint_nll[part])
                chunks.append(chunk)
                cache.score(chunks[-1])

        seconds = harness.seconds_of(score)()
        del cache, score  # so that there are never two caches in memory
        mass = ngram_score.mass(new(mode), chunks, progress_reporter(f"mass of {mode}"))
        results[mode] = {"targets_per_s": targets / seconds, "mass": mass._asdict()}
    return results


def measure(arguments: ScoringArguments, say: harness.Say) -> dict[str, Any]:
    """The speeds of scoring and of the plain forward pass, and the results of the caches."""
    config, T = arguments.overrides, arguments.overrides.data.seq_len
    if min(arguments.batches, arguments.repeats) < 1 or arguments.cache_targets < 0:
        raise UserError("--batches and --repeats must be 1 or more, --cache-targets 0 or more")
    stride = min(64, T) if arguments.stride is None else arguments.stride
    if not 1 <= stride <= T:
        raise UserError(f"--stride {stride} is not between 1 and data.seq_len = {T}")
    dataset = open_dataset(Path(config.data.dir), config.model.vocab_size)
    if len(dataset.val) <= T:
        found = f"the validation stream has {len(dataset.val)} tokens, less than one window"
        raise UserError(f"{config.data.dir}: {found}")
    targets = min(arguments.cache_targets, len(dataset.train) - 1)
    caches: dict[str, Any] = {}
    if targets:
        caches = cache_results(dataset.train, config.model.vocab_size, targets, stride, T)
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
        mass = "{mean:.6g} ({min:.6g} to {max:.6g})".format(**found["mass"])
        say(
            f"{mode:9} {found['targets_per_s']:>12,.0f} targets/s over {targets:,} targets,"
            f" one core; mass {mass}"
        )
    return result
