"""Second moments H = mean(x xᵀ) of the inputs x of a model's matrices over training text. GPTQ
rounds the matrices by H (Frantar et al. 2022, arXiv:2210.17323).

`Observed` matrices replace the arrays in the model's variables. They record their inputs while the
forward pass is traced, so the programs of training and scoring do not change.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.artifact.policy import MATRICES, policy_of
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, path_name
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset, TokenStream
from sngpt_jax.evaluation.step import on_each_device
from sngpt_jax.evaluation.windows import (
    OnProgress,
    WindowBatch,
    Windows,
    read_windows,
    rows_at_a_time,
)
from sngpt_jax.model.forward import Batch, Variables, forward
from sngpt_jax.model.layers import Observed

# shards that share their first 1024 tokens, or all of the shorter shard, hold the same text
SAME_TEXT = 1024

# the paths of the matrices that share an input → its second moment [n, n]
Moments = dict[tuple[str, ...], Any]


def training_stream(dataset: Dataset, tokens: int) -> TokenStream:
    """The training tokens of `dataset`, whose first `tokens` will be read. Raises `UserError` if a
    shard of these tokens begins like a validation shard.
    """
    first = 0
    for shard in dataset.train.shards:
        if first >= tokens:
            break
        first += len(shard.tokens)
        for held_out in dataset.val.shards:
            count = min(SAME_TEXT, len(shard.tokens), len(held_out.tokens))
            if np.array_equal(shard.tokens[:count], held_out.tokens[:count]):
                raise UserError(
                    f"{shard.path}: a training shard with the text of the validation shard"
                    f" {held_out.path}, which GPTQ must not see; give data with separate splits, or"
                    " set export.gptq to false"
                )
    return dataset.train


def sum_of_products(x_BTn: jax.Array, counted_B: jax.Array) -> jax.Array:
    """Σ x xᵀ, float32 [n, n], over the positions of the counted rows."""
    kept_BTn = jnp.where(counted_B[:, None, None], x_BTn, 0)
    options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    return jnp.einsum("btn,btm->nm", kept_BTn, x_BTn, **options)


def make_moments_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted function (variables, batch of "inputs" [B, T] and "counted" rows, bool [B]) →
    `Moments`, float32 sums in all processes, means over the applications of a recycled layer.
    """

    def moments(variables: Variables, batch: Batch) -> Moments:
        seen: dict[str, list[jax.Array]] = {}  # by path, the input of each application

        def observe(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array | Observed:
            name = path_name(path)
            if policy_of(name, leaf.shape, config).group not in MATRICES:
                return leaf
            return Observed(leaf, seen.setdefault(name, []))

        observed = jax.tree_util.tree_map_with_path(observe, variables)
        # the logits are unused, so the compiler removes the last product and the head
        forward(config.model)(observed, batch["inputs"].astype(jnp.int32))

        # matrices with identical inputs share one moment
        sharing: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in seen.items():
            sharing.setdefault(tuple(map(id, inputs)), []).append(name)
        found: Moments = {}
        for names in sharing.values():
            sums = [sum_of_products(x_BTn, batch["counted"]) for x_BTn in seen[names[0]]]
            found[tuple(names)] = jax.lax.psum(jnp.mean(jnp.stack(sums), axis=0), BATCH_AXES)
        return found

    return on_each_device(config.model, mesh, moments)


def second_moments(
    config: Config,
    variables: Variables,
    stream: TokenStream,
    tokens: int,
    mesh: Mesh,
    progress: OnProgress | None = None,
) -> dict[str, np.ndarray]:
    """The path of every matrix [n, m] → the second moment of its inputs, float64 [n, n], symmetric.

    The mean is over the first ⌊tokens / T⌋ windows of T = `data.seq_len` tokens. Matrices with
    equal inputs share one array. Raises `UserError` unless a window ≤ `tokens` ≤ the stream.
    """
    seq_len = config.data.seq_len
    if not seq_len <= tokens <= len(stream):
        raise UserError(
            f"export.gptq_tokens = {tokens} is not between one sequence, data.seq_len = {seq_len},"
            f" and the {len(stream)} tokens of the training shards; set it between them"
        )
    windows = Windows(tokens // seq_len * seq_len, seq_len, seq_len)
    rows = rows_at_a_time(windows, config.eval.device_batch_tokens, mesh.devices.size)
    step = Fitted(make_moments_step(config, mesh), mesh, "calibrating")
    place = batch_placer(mesh)

    def dispatch(batch: WindowBatch) -> Moments:
        return step(variables, place({"inputs": batch.arrays["inputs"], "counted": batch.counted}))

    total: Moments = {}
    for sums, _ in read_windows(stream, windows, rows, dispatch, progress):
        for paths, sum_nn in sums.items():
            total[paths] = np.asarray(sum_nn, np.float64) + total.get(paths, 0)
    found: dict[str, np.ndarray] = {}
    for paths, sum_nn in total.items():
        # the rounding of a product need not be symmetric
        found |= dict.fromkeys(paths, (sum_nn + sum_nn.T) / (2 * windows.targets))
    return found
