"""The text that the features of sparse codes fire on. A feature fires where it is selected.

A slice of validation text is read twice. The first pass counts how often each feature fires, and
with which parents. The second pass collects, for chosen features, the strongest contexts and the
tokens that they fire on.
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

from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.shards import TokenStream
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.evaluation.health import is_dead
from sngpt_jax.evaluation.step import on_each_device
from sngpt_jax.evaluation.windows import OnProgress, WindowBatch, Windows, read_windows
from sngpt_jax.features.counts import Examples, FiringCounts, choose
from sngpt_jax.model.cayley import activations, code_state
from sngpt_jax.model.forward import Batch, Variables, tapped_losses

BEFORE, AFTER = 16, 8  # tokens of a context around the token that fired
TOKENS, RELATIVES = 12, 16  # most tokens, parents and children listed per feature
BOS_MARK = "⟨bos⟩"  # stands for the start of a document


def make_selections(config: ModelConfig, mesh: Mesh, layers: Sequence[int]) -> jax.stages.Wrapped:
    """The jitted function (variables, batch [B, T]) → (ids, activations) of the `layers` at every
    token, [L, B, T, A] each.
    """

    def local(variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
        everywhere = jnp.arange(batch["inputs"].shape[1])
        _, taps = tapped_losses(config)(variables, batch["inputs"], batch["targets"], everywhere)
        assert taps is not None
        taps, code = jax.tree.map(
            lambda array: array[np.array(layers)], (taps, code_state(variables))
        )
        return taps.ids, jax.lax.map(lambda layer: activations(config, *layer)[1], (taps, code))

    return on_each_device(config, mesh, local, P(None, BATCH_AXES))


Selection = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Slice:
    """The start of a validation stream in standard windows, and the model that reads it."""

    stream: TokenStream
    windows: Windows
    rows: int  # windows per batch
    mesh: Mesh
    select: Callable[..., tuple[jax.Array, jax.Array]]  # of make_selections
    variables: Variables

    def selections(self, progress: OnProgress) -> Iterator[Selection]:
        """(index of the layer, ids [N, A], activations [N, A], tokens [N], positions [N]) for
        batches of N tokens.
        """
        place = batch_placer(self.mesh)

        def dispatch(batch: WindowBatch) -> tuple[jax.Array, jax.Array]:
            return self.select(self.variables, place(batch.arrays))

        first = 0
        batches = read_windows(self.stream, self.windows, self.rows, dispatch, progress)
        for selected, batch in batches:
            tokens = batch.arrays["inputs"][: batch.count].reshape(-1)
            positions = first + np.arange(len(tokens))
            for layer, arrays in enumerate(zip(*selected, strict=True)):
                ids, strengths = (
                    np.asarray(array)[: batch.count].reshape(len(tokens), -1) for array in arrays
                )
                yield layer, ids, strengths, tokens, positions
            first += len(tokens)


# --------------------------------------------------------------------------------------- the result


def text_reader(tokenizer: Tokenizer) -> Callable[[np.ndarray], str]:
    """A function from tokens to their text in the middle of a document, leading space included."""
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
    """For each level of the layer at index `layer`: how often its features fire."""
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
    """The parents or children `ids` [n] of a feature that fired `together` [n] > 0 times with it,
    most often first.
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
    progress: Callable[[str], OnProgress],
) -> dict[str, Any]:
    """`layers` with the counts of all features, and `features` with the examples of the chosen
    ones. Reads the slice once for each.
    """
    levels, tokens, seq_len = config.levels, piece.windows.targets, piece.windows.seq_len
    firing = FiringCounts(levels, config.generators, len(layers))
    for layer, ids, strengths, _, _ in piece.selections(progress("counts")):
        firing.add(layer, ids, strengths)
    chosen = [
        (layer, level, feature)
        for layer in range(len(layers))
        for level, ids in enumerate(choose(firing, layer, features_per_level))
        for feature in ids
    ]
    places = [(layer, feature) for layer, _, feature in chosen]
    num_layers, num_features = firing.counts.shape
    examples = Examples(places, num_layers, num_features, contexts)
    for selection in piece.selections(progress("examples")):
        examples.add(*selection)

    read = text_reader(tokenizer)
    frequency = np.bincount(piece.stream.take(0, tokens), minlength=2**16) / tokens

    def context(position: int, strength: float) -> dict[str, Any]:
        # the model saw nothing before its window
        first = max(position - BEFORE, position // seq_len * seq_len)
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
        total = int(counts[feature])
        strongest, positions = examples.strongest(place)
        fired_on, times = examples.tokens(place)
        parents: list[dict[str, Any]] = []
        children: list[dict[str, Any]] = []
        if level:
            ids, together = firing.parents(layer, level, feature)
            parents = relatives(ids, together, counts[ids], counts[feature])
        if level + 1 < len(levels):
            ids, together = firing.children(layer, level, feature)
            children = relatives(ids, together, counts[feature], counts[ids])
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
            "parents": parents,
            "children": children,
        }

    return {
        "layers": [
            {"layer": number, "levels": overview(firing, config.generators, layer, tokens)}
            for layer, number in enumerate(layers)
        ],
        "features": [describe(place, *feature) for place, feature in enumerate(chosen)],
    }
