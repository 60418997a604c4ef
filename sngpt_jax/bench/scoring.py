"""How fast a model is scored on this machine: `python -m sngpt_jax.bench scoring --config C
--data.dir DIR`.

Scoring in windows beside the plain forward pass of the same batches, both in forward tokens a
second, each input of a window counted; and the n-gram caches alone on the training shards, in
targets a second on one core, with the mass of what they give. The weights are those of the
recipe's start.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, gather, make_mesh, partition_specs
from sngpt_jax.config import Config
from sngpt_jax.config.options import Json, OptionalInt, Quiet
from sngpt_jax.config.recipe import Overrides, parse_command
from sngpt_jax.data.shards import Dataset, TokenStream, open_dataset
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.ngram import score as ngram_score
from sngpt_jax.evaluation.ngram.cache import Cache, Mode, make_cache
from sngpt_jax.evaluation.ngram.chunk import Chunk
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, window_batches
from sngpt_jax.model.forward import Variables, abstract_variables, hidden
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.training.state import Shapes, init_state


@dataclass(frozen=True)
class BenchArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    # of the sliding windows; default: 64, or a whole window where that is less
    stride: OptionalInt = None
    batches: int = 16  # of windows in each timing
    repeats: int = 5  # of each timing, of which the median counts
    # targets that each n-gram cache scores, from the training shards; 0: none
    cache_targets: int = 4_000_000
    json: Json = ""
    quiet: Quiet = False


def make_forward(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The plain forward pass: (variables, inputs [B, T]) → one number a row, so that nothing is
    left out or read back.
    """
    layout = partition_specs(mesh, abstract_variables(config.model))

    def local(variables: Variables, inputs_BT: jax.Array) -> jax.Array:
        x_BTD = hidden(config.model)(gather(variables, layout), inputs_BT.astype(jnp.int32))
        return jnp.sum(x_BTD, axis=(1, 2), dtype=jnp.float32)

    rows = P(BATCH_AXES)
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(layout, rows), out_specs=rows, check_vma=False)
    )


def forward_speeds(
    config: Config, dataset: Dataset, stride: int, batches: int, repeats: int
) -> dict[str, float]:
    """Forward tokens a second: the plain pass over batches that lie on the device, and scoring
    from the stream to the score.
    """
    mesh, T, most = make_mesh(), config.data.seq_len, config.eval.device_batch_tokens
    variables = init_state(Shapes.of(config, mesh)).variables()
    token_bytes = dataset.tokenizer.token_bytes()
    work: dict[str, tuple[int, Callable[[], Any]]] = {}
    for name, S in (("standard", T), ("sliding", stride)):
        rows = max(1, most // T) * mesh.devices.size
        targets = min(len(dataset.val) - 1, T + (batches * rows - -(-T // S)) * S)
        windows = Windows(max(targets, T), T, S)
        rows = rows_at_a_time(windows, most, mesh.devices.size)
        step, plain = make_eval_step(config.model, mesh), make_forward(config, mesh)
        inputs = batch_placer(mesh)(
            {"inputs": next(window_batches(dataset.val, windows, rows)).arrays["inputs"]}
        )["inputs"]
        count = -(-windows.num_rows // rows)

        def score(windows: Windows = windows, step: jax.stages.Wrapped = step) -> None:
            Pass(variables, step, dataset.val, token_bytes, mesh, windows, most).score()

        def forward(
            inputs: jax.Array = inputs, plain: jax.stages.Wrapped = plain, count: int = count
        ) -> None:
            jax.block_until_ready([plain(variables, inputs) for _ in range(count)])

        work[f"forward_{name}"] = (count * rows * T, forward)
        work[f"score_{name}"] = (windows.num_rows * T, score)
    speeds: dict[str, list[float]] = {name: [] for name in work}
    progress = progress_reporter("rounds")
    # all in turn, so that a busy moment does not fall on one alone; the first one compiles
    for turn in range(repeats + 1):
        for name, (tokens, run) in work.items():
            start = time.perf_counter()
            run()
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - start))
        progress(turn + 1, repeats + 1)
    return {name: statistics.median(found) for name, found in speeds.items()}


def cache_results(
    stream: TokenStream, vocab_size: int, targets: int, stride: int, seq_len: int
) -> dict[str, dict[str, float | dict[str, float]]]:
    """Of each n-gram cache its targets a second, and the mass of what it gives, beside a model
    whose readings are drawn.
    """
    tokens = stream.take(0, targets + 1)
    rng = np.random.default_rng(0)
    nll, entropy, hint_nll = (rng.gamma(2.0, 1.5, targets).astype(np.float32) for _ in range(3))
    ones = np.ones(targets, np.float32)
    parts = [slice(first, min(first + 2**16, targets)) for first in range(0, targets, 2**16)]
    results: dict[str, dict[str, float | dict[str, float]]] = {}
    for mode in get_args(Mode):

        def new(mode: Mode = mode) -> Cache:
            return make_cache(
                mode,
                first_token=int(tokens[0]),
                vocab_size=vocab_size,
                targets=targets,
                first_segment=seq_len,
                segment=stride,
                memory=4 * 2**30,
            )

        cache = new()
        ngram_score.warm_up(cache)
        chunks = []
        start = time.perf_counter()
        for part in parts:
            following = tokens[1:][part]
            hints = cache.hints(following) if cache.hints else None
            chunks.append(
                Chunk(following, nll[part], entropy[part], ones[part], hints, hint_nll[part])
            )
            cache.score(chunks[-1])
        seconds = time.perf_counter() - start
        del cache  # or there were two at a time
        mass = ngram_score.mass(new(), chunks, progress_reporter(f"mass of {mode}"))
        results[mode] = {"targets_per_s": targets / seconds, "mass": asdict(mass)}
    return results


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        BenchArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.bench scoring",
        description=(
            "Times the scoring of a recipe's model, and the n-gram caches, on the device at hand."
        ),
    )
    cli.log_to_stderr(arguments.quiet)
    config = arguments.overrides
    if min(arguments.batches, arguments.repeats) < 1 or arguments.cache_targets < 0:
        raise UserError("--batches and --repeats are 1 or more, --cache-targets 0 or more")
    stride = min(64, config.data.seq_len) if arguments.stride is None else arguments.stride
    if not 1 <= stride <= config.data.seq_len:
        raise UserError(
            f"--stride {stride} is not between 1 and data.seq_len = {config.data.seq_len}"
        )
    cli.check_json(arguments.json)
    dataset = open_dataset(Path(config.data.dir), config.model.vocab_size)
    if len(dataset.val) <= config.data.seq_len:
        raise UserError(
            f"{config.data.dir}: the validation stream has {len(dataset.val)} tokens, less than one"
            " window"
        )
    targets = min(arguments.cache_targets, len(dataset.train) - 1)
    caches: dict[str, Any] = {}
    if targets:
        caches = cache_results(
            dataset.train, config.model.vocab_size, targets, stride, config.data.seq_len
        )
    speeds = forward_speeds(config, dataset, stride, arguments.batches, arguments.repeats)
    shares = {
        name: speeds[f"score_{name}"] / speeds[f"forward_{name}"]
        for name in ("standard", "sliding")
    }
    device = jax.devices()[0]
    if arguments.json != "-":
        print(
            f"{len(jax.devices())} × {device.device_kind}, windows of {config.data.seq_len}, stride"
            f" {stride}"
        )
        for name, share in shares.items():
            print(
                f"{name:9} {speeds[f'score_{name}']:>12,.0f} forward tok/s, {share:.3f} of the"
                f" plain forward pass's {speeds[f'forward_{name}']:,.0f}"
            )
        for mode, found in caches.items():
            mass = found["mass"]
            print(
                f"{mode:9} {found['targets_per_s']:>12,.0f} targets/s over {targets:,} targets, one"
                f" core; mass {mass['mean']:.6g} ({mass['min']:.6g} to {mass['max']:.6g})"
            )
    result = {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "forward_tok_per_s": speeds,
        "share_of_forward": shares,
        "cache_targets": targets,
        "caches": caches,
    }
    cli.write_json(result, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
