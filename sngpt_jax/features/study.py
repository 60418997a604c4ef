"""What the features of sparse codes stand for, by the text that they fire on. To fire is to be
selected.

A slice of validation text is read twice: once to count how often each feature fires, and with
which parents; then, for some chosen features, to collect the strongest contexts and the tokens
that they fire on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sngpt_kernels.cayley import dictionary

from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, gather, partition_specs
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.shards import TokenStream
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.evaluation.health import is_dead
from sngpt_jax.evaluation.windows import Windows, window_batches
from sngpt_jax.features.counts import Examples, FiringCounts, choose
from sngpt_jax.model.cayley import activations, code_state
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, tapped_losses

BEFORE, AFTER = 16, 8  # tokens of a context around the one that fired
TOKENS, RELATIVES = 12, 16  # most tokens, parents and children listed of a feature
BOS_MARK = "⟨bos⟩"  # how the start of a document is written


def make_selections(config: ModelConfig, mesh: Mesh, layers: Sequence[int]) -> jax.stages.Wrapped:
    """The jitted function (variables, batch [B, T]) → (ids, activations) of the `layers` at every
    token, [L, B, T, A] each.
    """
    layout, rows = partition_specs(mesh, abstract_variables(config)), P(BATCH_AXES)

    def local(variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
        variables = gather(variables, layout)
        everywhere = jnp.arange(batch["inputs"].shape[1])
        _, taps = tapped_losses(config)(variables, batch["inputs"], batch["targets"], everywhere)
        assert taps is not None
        taps, code = jax.tree.map(
            lambda array: array[np.array(layers)], (taps, code_state(variables))
        )
        return taps.ids, jax.lax.map(lambda layer: activations(config, *layer)[1], (taps, code))

    split = P(None, BATCH_AXES)
    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(layout, rows), out_specs=(split, split), check_vma=False
        )
    )


Selection = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Slice:
    """The start of a validation stream in standard windows, and the model that reads them."""

    stream: TokenStream
    windows: Windows
    rows: int  # windows read at a time
    mesh: Mesh
    select: Callable[..., tuple[jax.Array, jax.Array]]  # see make_selections
    variables: Variables

    def selections(self, progress: Callable[[int, int], None]) -> Iterator[Selection]:
        """(index of the layer, ids [N, A], activations [N, A], tokens [N], positions [N]) for
        batches of N tokens.
        """
        place, T = batch_placer(self.mesh), self.windows.seq_len
        done = 0
        for batch in window_batches(self.stream, self.windows, self.rows):
            count, inputs = batch.count, batch.arrays["inputs"]
            ids, strengths = self.select(self.variables, place(batch.arrays))
            for layer in range(len(ids)):
                flat = [
                    np.asarray(array[layer])[:count].reshape(count * T, -1)
                    for array in (ids, strengths)
                ]
                yield (
                    layer,
                    flat[0],
                    flat[1],
                    inputs[:count].reshape(-1),
                    done * T + np.arange(count * T),
                )
            done += count
            progress(done, self.windows.count)


# ---------------------------------------------------------------------------------------------- what is written


def text_reader(tokenizer: Tokenizer) -> Callable[[np.ndarray], str]:
    """A function of tokens that gives the text they stand for in the middle of a text, leading
    space included.
    """
    anchor = int(tokenizer.encode("a")[-1])
    skipped = len(tokenizer.decode([anchor]))

    def read(ids: np.ndarray) -> str:
        pieces = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))
        return BOS_MARK.join(
            tokenizer.decode([anchor, *piece.tolist()])[skipped:] for piece in pieces
        )

    return read


def rounded(x: float) -> float:
    """`x` to four significant digits."""
    return float(f"{x:.4g}")


def overview(
    firing: FiringCounts, generators: dictionary.Generators, layer: int, tokens: int
) -> list[dict[str, Any]]:
    """Of each level of the layer at index `layer`: how many features fire how often."""
    levels = []
    for level, (_, k, _) in enumerate(firing.levels):
        owned = dictionary.level_range(firing.levels, level)
        counts = firing.counts[layer, owned.start : owned.stop]
        levels.append(
            {
                "reachable": dictionary.reachable(firing.levels, level, generators),
                "fired": int(np.count_nonzero(counts)),
                "dead": float(is_dead(counts, tokens, k).mean()),
                # bin 0: never; bin i: 2^(i-1) to 2^i - 1 times
                "histogram": np.bincount(np.frexp(counts)[1]).tolist(),
                "counts": counts.tolist(),
            }
        )
    return levels


def relatives(
    ids: np.ndarray, together: np.ndarray, parent_counts: np.ndarray, child_counts: np.ndarray
) -> list[dict[str, Any]]:
    """Those of a feature's parents or children `ids` [n] that fired `together` [n] with it, most
    often first.
    """
    parent_counts, child_counts = (
        np.broadcast_to(counts, ids.shape) for counts in (parent_counts, child_counts)
    )
    return [
        {
            "id": int(ids[i]),
            "count": int(together[i]),
            "given_parent": rounded(together[i] / parent_counts[i]),
            "given_child": rounded(together[i] / child_counts[i]),
        }
        for i in np.argsort(-together.astype(np.int64), kind="stable")[:RELATIVES]
        if together[i]
    ]


def study_slice(
    config: ModelConfig,
    piece: Slice,
    tokenizer: Tokenizer,
    layers: Sequence[int],
    *,
    features_per_level: int,
    contexts: int,
    progress: Callable[[str], Callable[[int, int], None]],
) -> dict[str, Any]:
    """Reads the slice twice: once to count all features, once for the examples of the chosen ones;
    `layers` and `features`.
    """
    levels, tokens = config.levels, piece.windows.targets
    firing = FiringCounts(levels, config.generators, len(layers))
    for layer, ids, strengths, _, _ in piece.selections(progress("counts")):
        firing.add(layer, ids, strengths)
    chosen = [
        (layer, level, feature)
        for layer in range(len(layers))
        for level, ids in enumerate(choose(firing, layer, features_per_level))
        for feature in ids
    ]
    num_layers, num_features = firing.counts.shape
    examples = Examples(
        [(layer, feature) for layer, _, feature in chosen], num_layers, num_features, contexts
    )
    for selection in piece.selections(progress("examples")):
        examples.add(*selection)

    read = text_reader(tokenizer)
    frequency = np.bincount(piece.stream.take(0, tokens), minlength=2**16) / tokens

    def context(position: int, strength: float) -> dict[str, Any]:
        first = max(
            position - BEFORE, position // piece.windows.seq_len * piece.windows.seq_len
        )  # the model saw nothing before its window
        around = piece.stream.take(first, min(position + 1 + AFTER, len(piece.stream)) - first)
        at = position - first
        return {
            "before": read(around[:at]),
            "token": read(around[at : at + 1]),
            "after": read(around[at + 1 :]),
            "token_id": int(around[at]),
            "position": position,
            "activation": rounded(strength),
        }

    def describe(place: int, layer: int, level: int, feature: int) -> dict[str, Any]:
        counts = firing.counts[layer]
        strongest, positions = examples.strongest(place)
        fired_on, times = examples.tokens(place)
        total = int(counts[feature])
        parents = firing.parents(layer, level, feature) if level else None
        children = firing.children(layer, level, feature) if level + 1 < len(levels) else None
        return {
            "layer": layers[layer],
            "level": level,
            "id": feature,
            "count": total,
            "mean_activation": rounded(firing.sums[layer, feature] / total),
            "max_activation": rounded(strongest[0]),
            "tokens": [
                {
                    "id": int(token),
                    "text": read(fired_on[i : i + 1]),
                    "count": int(times[i]),
                    "share": rounded(times[i] / total),
                    "lift": rounded(times[i] / total / frequency[token]),
                }
                for i, token in enumerate(fired_on[:TOKENS])
            ],
            "contexts": [
                context(int(p), float(c)) for p, c in zip(positions, strongest, strict=True)
            ],
            "parents": relatives(*parents, counts[parents[0]], counts[feature]) if parents else [],
            "children": (
                relatives(*children, counts[feature], counts[children[0]]) if children else []
            ),
        }

    return {
        "layers": [
            {"layer": number, "levels": overview(firing, config.generators, layer, tokens)}
            for layer, number in enumerate(layers)
        ],
        "features": [describe(place, *feature) for place, feature in enumerate(chosen)],
    }
