"""Second moments H = mean(x xᵀ) of what a model's matrices are multiplied with over training text;
GPTQ rounds them by H.

Frantar et al. 2022, arXiv:2210.17323. `Observed` matrices stand in the model's variables for the
arrays, and note their inputs while the forward pass is traced. So training and scoring are
compiled as ever.

Cost. A token takes a forward pass without the head, and 2 n² operations for each input of width n:
those of query, key and value (one), out, up and down. With widths D and F, and K of H key/value
heads, that is (3 D² + F²) / (2 D² + 2 D² K/H + 2 D F) of the products with the matrices
themselves, 1.33 with F = 3 D and K = H/2. The host adds up 4 n² bytes for each, a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.artifact.policy import MATRICES, policy_of
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, gather, partition_specs, path_name
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset, TokenStream
from sngpt_jax.evaluation.windows import Windows, rows_at_a_time, window_batches
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, forward
from sngpt_jax.model.layers import Observed

# tokens; shards that begin with so many in common, or the whole of the shorter one, hold the same
# text
SAME_TEXT = 1024

# the paths of the matrices that share an input → its second moment [n, n]
Moments = dict[tuple[str, ...], Any]


def training_stream(dataset: Dataset, tokens: int) -> TokenStream:
    """The training tokens of `dataset`, of which the first `tokens` are to be read.

    Raises `UserError` where one of the shards that hold those is a validation shard too, as the
    file, as a copy, or as text that begins with the same 1,024 tokens. Beyond that the maker of
    the shards keeps the splits apart, as `prepare` does.
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
                    f" {held_out.path}; GPTQ must not see what the artifact is scored on: take data"
                    " whose splits are apart, or leave export.gptq out"
                )
    return dataset.train


# ---------------------------------------------------------------------------------------------- on the devices


def sum_of_products(x_BTn: jax.Array, counted_B: jax.Array) -> jax.Array:
    """Σ x xᵀ, float32 [n, n], over the positions of the rows that count. Products of bfloat16
    numbers are exact in it.
    """
    kept_BTn = jnp.where(counted_B[:, None, None], x_BTn, 0)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(
        "btn,btm->nm", kept_BTn, x_BTn, precision=highest, preferred_element_type=jnp.float32
    )


def make_moments_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted function (variables, batch) → `Moments`, sums over a batch, float32, known to all
    processes.

    The batch holds "inputs" [B, T], and "counted" bool [B]: the rows that are in the sums. Of a
    matrix that is applied more than once, which recycled layers' are, the sum is the mean of its
    applications'.
    """
    layout, rows = partition_specs(mesh, abstract_variables(config.model)), P(BATCH_AXES)

    def moments(variables: Variables, batch: Batch) -> Moments:
        seen: dict[str, list[jax.Array]] = {}  # by path, the input of each application

        def observe(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array | Observed:
            name = path_name(path)
            if policy_of(name, leaf.shape, config).group not in MATRICES:
                return leaf
            return Observed(leaf, seen.setdefault(name, []))

        observed = jax.tree_util.tree_map_with_path(observe, gather(variables, layout))
        # nobody takes the logits, so the compiler leaves the last product and the head out
        forward(config.model)(observed, batch["inputs"].astype(jnp.int32))

        # by the very arrays that they are multiplied with
        sharing: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in seen.items():
            sharing.setdefault(tuple(map(id, inputs)), []).append(name)

        def mean(inputs: Sequence[jax.Array]) -> jax.Array:
            sums = [sum_of_products(x_BTn, batch["counted"]) for x_BTn in inputs]
            return jax.lax.psum(jnp.mean(jnp.stack(sums), axis=0), BATCH_AXES)

        return {tuple(names): mean(seen[names[0]]) for names in sharing.values()}

    return jax.jit(
        jax.shard_map(moments, mesh=mesh, in_specs=(layout, rows), out_specs=P(), check_vma=False)
    )


# ---------------------------------------------------------------------------------------------- on the host


def second_moments(
    config: Config,
    variables: Variables,
    stream: TokenStream,
    tokens: int,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """The path of every matrix [n, m] → the second moment of its inputs, float64 [n, n], symmetric.

    The mean is over the inputs at all positions of the first ⌊tokens / T⌋ windows of T =
    `data.seq_len` tokens of `stream` (of `training_stream`), and over all applications of a
    recycled layer. Matrices with the same input share one array. `variables` lie on the mesh as a
    step's do. Summed over `eval.device_batch_tokens` on a device in float32, and over batches in
    float64 on the host. `progress(done, total)` is told of windows as they are read.

    Raises `UserError` where `tokens` are less than a window, or more than the stream holds.
    """
    seq_len, devices = config.data.seq_len, mesh.devices.size
    if not seq_len <= tokens <= len(stream):
        raise UserError(
            f"export.gptq_tokens = {tokens} is not between one sequence, data.seq_len = {seq_len},"
            f" and the {len(stream)} tokens of the training shards; set it there"
        )
    windows = Windows(tokens // seq_len * seq_len, seq_len, seq_len)
    rows = rows_at_a_time(windows, config.eval.device_batch_tokens, devices)
    step, place = make_moments_step(config, mesh), batch_placer(mesh)
    total: dict[tuple[str, ...], np.ndarray] = {}
    done = 0
    pending: tuple[Moments, int] | None = None

    def read(sums: Moments, count: int) -> None:
        nonlocal done
        for paths, sum_nn in sums.items():
            if paths in total:
                total[paths] += np.asarray(sum_nn)
            else:
                total[paths] = np.asarray(sum_nn, np.float64)
        done += count
        if progress:
            progress(done, windows.count)

    for batch in window_batches(stream, windows, rows):
        arrays = {"inputs": batch.arrays["inputs"], "counted": np.arange(rows) < batch.count}
        dispatched = step(variables, place(arrays)), batch.count
        if pending:  # read behind the device's back
            read(*pending)
        pending = dispatched
    if pending:
        read(*pending)

    found: dict[str, np.ndarray] = {}
    for paths, sum_nn in total.items():
        # a product's rounding may not be symmetric
        moment = (sum_nn + sum_nn.T) / (2 * windows.targets)
        found |= dict.fromkeys(paths, moment)
    return found
