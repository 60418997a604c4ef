"""The text that the features of sparse codes fire on, which means where they are selected.

The first pass over a slice of text counts firings and chooses features; the second collects their
strongest contexts and their tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sngpt_kernels.cayley import dictionary

from sngpt_jax.cluster.memory import Fitted
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
from sngpt_jax.run.console import progress_reporter

BEFORE, AFTER = 16, 8  # tokens of a context around the token that fired
TOKENS, RELATIVES = 12, 16  # most tokens, parents and children listed per feature
BOS_MARK = "⟨bos⟩"  # stands for the start of a document


def make_selections(config: ModelConfig, mesh: Mesh, layers: Sequence[int]) -> jax.stages.Wrapped:
    """The jitted (variables, batch [B, T]) → (ids, activations) of `layers`, [L, B, T, A] each."""

    def local(variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
        everywhere = jnp.arange(batch["inputs"].shape[1])
        _, taps = tapped_losses(config)(variables, batch["inputs"], batch["targets"], everywhere)
        assert taps is not None
        chosen = jax.tree.map(lambda x: x[np.array(layers)], (taps, code_state(variables)))
        return chosen[0].ids, jax.lax.map(lambda layer: activations(config, *layer)[1], chosen)

    return on_each_device(config, mesh, local, P(None, BATCH_AXES))


Selection = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Slice:
    """The start of a validation stream in standard windows, and the model that reads it."""

    stream: TokenStream
    windows: Windows
    rows: int  # windows per batch
    mesh: Mesh
    layers: Sequence[int]
    config: ModelConfig
    variables: Variables

    @cached_property
    def select(self) -> Fitted:
        """That of `make_selections`."""
        return Fitted(make_selections(self.config, self.mesh, self.layers), self.mesh, "studying")

    def selections(self, progress: OnProgress) -> Iterator[Selection]:
        """Layer index, ids [N, A], activations [N, A], tokens [N], positions [N] of each batch."""
        place = batch_placer(self.mesh)

        def dispatch(batch: WindowBatch) -> tuple[jax.Array, jax.Array]:
            return self.select(self.variables, place(batch.arrays))

        first = 0
        for selected, batch in read_windows(
            self.stream, self.windows, self.rows, dispatch, progress
        ):
            tokens = batch.arrays["inputs"][: batch.count].reshape(-1)
            positions = first + np.arange(len(tokens))
            for layer, arrays in enumerate(zip(*selected, strict=True)):
                ids, strengths = (
                    np.asarray(array)[: batch.count].reshape(len(tokens), -1) for array in arrays
                )
                yield layer, ids, strengths, tokens, positions
            first += len(tokens)


def text_reader(tokenizer: Tokenizer) -> Callable[[np.ndarray], str]:
    """A function from tokens to their text in the middle of a document, leading space included."""
    anchor = int(tokenizer.encode("a")[-1])
    skipped = len(tokenizer.decode([anchor]))

    def read(ids: np.ndarray) -> str:
        pieces = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))
        texts = (tokenizer.decode([anchor, *piece.tolist()])[skipped:] for piece in pieces)
        return BOS_MARK.join(texts)

    return read


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def overview(
    firing: FiringCounts, generators: dictionary.Generators, layer: int, tokens: int
) -> list[dict[str, Any]]:
    """How often the features of each level of the layer at index `layer` fire."""
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
    """The parents or children `ids` [n] of a feature that fired with it, most often first.

    They fired `together` [n] times. The counts are those of the parents and of the children.
    """
    given_parent = together / np.maximum(parent_counts, 1)
    given_child = together / np.maximum(child_counts, 1)
    return [
        {
            "id": int(ids[i]),
            "count": int(together[i]),
            "given_parent": _rounded(given_parent[i]),
            "given_child": _rounded(given_child[i]),
        }
        for i in np.argsort(-together.astype(np.int64), kind="stable")[:RELATIVES]
        if together[i]
    ]


def study_slice(
    piece: Slice, tokenizer: Tokenizer, *, features_per_level: int, contexts: int
) -> dict[str, Any]:
    """`layers` with the counts of all features, and `features` with examples of the chosen ones."""
    config, layers = piece.config, piece.layers
    levels, tokens, seq_len = config.levels, piece.windows.targets, piece.windows.seq_len
    firing = FiringCounts(levels, config.generators, len(layers))
    for layer, ids, strengths, _, _ in piece.selections(progress_reporter("counts")):
        firing.add(layer, ids, strengths)
    chosen = [
        (layer, level, feature)
        for layer in range(len(layers))
        for level, ids in enumerate(choose(firing, layer, features_per_level))
        for feature in ids
    ]
    places = [(layer, feature) for layer, _, feature in chosen]
    examples = Examples(places, firing.counts.shape, contexts)
    for selection in piece.selections(progress_reporter("examples")):
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
            "activation": _rounded(strength),
        }

    def describe(place: int, layer: int, level: int, feature: int) -> dict[str, Any]:
        counts = firing.counts[layer]
        total = int(counts[feature])
        strongest, positions = examples.strongest(place)
        parents: list[dict[str, Any]] = []
        children: list[dict[str, Any]] = []
        if level:
            ids, together = firing.parents(layer, level, feature)
            parents = relatives(ids, together, counts[ids], counts[feature])
        if level + 1 < len(levels):
            ids, together = firing.children(layer, level, feature)
            children = relatives(ids, together, counts[feature], counts[ids])
        tokens_fired_on = [
            {
                "id": int(token),
                "text": read(np.array([token])),
                "count": int(count),
                "share": _rounded(count / total),
                "lift": _rounded(count / total / frequency[token]),
            }
            for token, count in islice(zip(*examples.tokens(place), strict=True), TOKENS)
        ]
        return {
            "layer": layers[layer],
            "level": level,
            "id": feature,
            "count": total,
            "mean_activation": _rounded(firing.sums[layer, feature] / total),
            "max_activation": _rounded(strongest[0]),
            "tokens": tokens_fired_on,
            "contexts": list(map(context, positions.tolist(), strongest.tolist())),
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
