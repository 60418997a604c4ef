"""The counts of the feature study, in numpy: how often features fire, with what, and on what.

Arrays come in batches of N tokens of one layer: the features that each token selected, ids [N, A]
level by level, and their activations [N, A].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sngpt_kernels.cayley.dictionary import Generators, Levels, children, level_range


@dataclass(frozen=True)
class Family:
    """A level's features (children), and those of the level above (parents).

    The parents of one group share S children, which no other group has.
    """

    parents: range  # ids of the level above
    group_of_parent: np.ndarray  # int32 [last parent + 1]
    group_of_child: np.ndarray  # int32 [last child + 1]; -1: no child
    slot_of_child: np.ndarray  # int32 [last child + 1], its index among the group's children
    children_of_group: np.ndarray  # int32 [groups, S]

    @classmethod
    def of(cls, levels: Levels, level: int, generators: Generators) -> "Family":
        """The family of `level` ≥ 1 and the level above."""
        table = children(levels, generators, level)
        ids = table.representatives[:, None] ^ table.steps[None, :]
        last = 2 ** levels[level][0]
        group, slot = np.full(last, -1, np.int32), np.zeros(last, np.int32)
        group[ids], slot[ids] = np.indices(ids.shape)
        return cls(level_range(levels, level - 1), table.group_of_parent, group, slot, ids)

    def parents_of(self, child: int) -> np.ndarray:
        """The ids [n] of a child's parents, ascending."""
        ids = np.arange(self.parents.start, self.parents.stop)
        return ids[self.group_of_parent[ids] == self.group_of_child[child]]

    def children_of(self, parent: int) -> np.ndarray:
        """The ids [n] of a parent's children."""
        return self.children_of_group[self.group_of_parent[parent]]

    def pair(self, parents: np.ndarray | int, offspring: np.ndarray | int) -> np.ndarray:
        """The indices parent · S + slot of child of pairs of relatives."""
        slots = self.children_of_group.shape[1]
        return np.asarray(parents, np.int64) * slots + self.slot_of_child[offspring]


class FiringCounts:
    """How often each feature of each layer fired, how strongly, and with which parents.

    Memory per layer: 16 bytes per feature and 4 bytes per pair of a parent's id and a child, 28 MB
    for the levels 10,16,0;15,32,256;17,64,256.
    """

    def __init__(self, levels: Levels, generators: Generators, num_layers: int):
        self.levels = levels
        self.families = [Family.of(levels, level, generators) for level in range(1, len(levels))]
        ends = np.cumsum([0, *(k for _, k, _ in levels)]).tolist()
        self._columns = [slice(*ends[level : level + 2]) for level in range(len(levels))]
        num_features = 2 ** levels[-1][0]
        # tokens that selected the feature
        self.counts = np.zeros((num_layers, num_features), np.int64)
        self.sums = np.zeros((num_layers, num_features))  # of its activations on them
        # by family, tokens that selected both of a pair: uint32 [layers, pairs]
        self._pairs = [
            np.zeros((num_layers, f.parents.stop * f.children_of_group.shape[1]), np.uint32)
            for f in self.families
        ]

    def add(self, layer: int, ids: np.ndarray, activations: np.ndarray) -> None:
        """Counts a batch of the layer at index `layer`."""
        flat, num_features = ids.reshape(-1), self.counts.shape[1]
        self.counts[layer] += np.bincount(flat, minlength=num_features)
        self.sums[layer] += np.bincount(flat, activations.reshape(-1), num_features)
        for level, family in enumerate(self.families, start=1):
            parents, offspring = ids[:, self._columns[level - 1]], ids[:, self._columns[level]]
            groups = family.group_of_parent[parents], family.group_of_child[offspring]
            token, p, c = np.nonzero(groups[0][:, :, None] == groups[1][:, None, :])
            pairs = family.pair(parents[token, p], offspring[token, c])
            np.add.at(self._pairs[level - 1][layer], pairs, np.uint32(1))

    def parents(self, layer: int, level: int, child: int) -> tuple[np.ndarray, np.ndarray]:
        """The parents [n] of a feature of `level` ≥ 1, and on how many tokens [n] it fired too."""
        family = self.families[level - 1]
        ids = family.parents_of(child)
        return ids, self._pairs[level - 1][layer][family.pair(ids, child)]

    def children(self, layer: int, level: int, parent: int) -> tuple[np.ndarray, np.ndarray]:
        """The children [n] of a feature, and on how many tokens [n] each fired with it."""
        family = self.families[level]
        ids = family.children_of(parent)
        return ids, self._pairs[level][layer][family.pair(parent, ids)]


def choose(firing: FiringCounts, layer: int, per_level: int) -> list[list[int]]:
    """The features of a layer to study, ids ascending for each level.

    Half of `per_level` are the features of a level that fired most. The other half are spread
    evenly over the ranks of the others. Then each chosen feature adds the child that fired most
    with it, from the first level down, and the parent, from the last level up. Ties go to the
    lowest id.
    """
    levels = range(len(firing.levels))
    chosen: list[set[int]] = []
    for level in levels:
        owned = level_range(firing.levels, level)
        counts = firing.counts[layer, owned.start : owned.stop]
        ranked = owned.start + np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        most, others = np.split(ranked, [per_level - per_level // 2])
        even = np.linspace(0, len(others) - 1, min(per_level // 2, len(others))).round().astype(int)
        chosen.append({*most.tolist(), *others[even].tolist()})
    for level in levels[:-1]:
        for feature in chosen[level]:
            chosen[level + 1].update(_closest(*firing.children(layer, level, feature)))
    for level in reversed(levels[1:]):
        for feature in chosen[level]:
            chosen[level - 1].update(_closest(*firing.parents(layer, level, feature)))
    return [sorted(ids) for ids in chosen]


def _closest(ids: np.ndarray, together: np.ndarray) -> list[int]:
    best = np.lexsort((ids, -together.astype(np.int64)))[0]
    return [int(ids[best])] if together[best] else []


class Examples:
    """For each chosen feature the strongest firings, and how often each token fired it.

    A firing is the feature's place in the list of chosen ones, its activation, and the position.
    """

    def __init__(self, chosen: Sequence[tuple[int, int]], shape: tuple[int, ...], per_feature: int):
        """`chosen`: (layer index, feature) of each; `shape`: (layers, features)."""
        self._per_feature = per_feature
        self._place = np.full(shape, -1, np.int32)
        self._place[*np.transpose(chosen)] = np.arange(len(chosen))
        self.place, self.position = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.activation = np.zeros(0)
        # key = place · 2^16 + token
        self.token_key, self.token_count = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(
        self,
        layer: int,
        ids: np.ndarray,
        activations: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Adds a batch of the layer at index `layer`: `tokens` uint16 [N] at `positions` [N]."""
        places = self._place[layer][ids]
        token, column = np.nonzero(places >= 0)
        place = places[token, column].astype(np.int64)

        keys = np.concatenate([self.token_key, place * 2**16 + tokens[token]])
        counts = np.concatenate([self.token_count, np.ones(len(token), np.int64)])
        self.token_key, inverse = np.unique(keys, return_inverse=True)
        self.token_count = np.bincount(inverse, counts, len(self.token_key)).astype(np.int64)

        place = np.concatenate([self.place, place])
        activation = np.concatenate([self.activation, activations[token, column]])
        position = np.concatenate([self.position, positions[token]])
        order = np.lexsort((position, -activation, place))
        ordered = place[order]
        # among the firings of one feature
        rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        kept = order[rank < self._per_feature]
        self.place, self.activation, self.position = place[kept], activation[kept], position[kept]

    def strongest(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Activations [n] and positions [n] of a feature's strongest firings, descending."""
        rows = slice(*np.searchsorted(self.place, [place, place + 1]))
        return self.activation[rows], self.position[rows]

    def tokens(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [n] that fired a feature, and how often each did [n], most often first."""
        rows = slice(*np.searchsorted(self.token_key, [place * 2**16, (place + 1) * 2**16]))
        order = np.argsort(-self.token_count[rows], kind="stable")
        return self.token_key[rows][order] % 2**16, self.token_count[rows][order]
