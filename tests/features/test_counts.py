"""The counts of the feature study against loops over tokens and features, on features drawn at
random.
"""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from sngpt_kernels.cayley.dictionary import child_generators, level_range, span

from sngpt_jax.features.counts import Examples, Family, FiringCounts, choose

LEVELS = ((4, 3, 0), (6, 4, 16), (8, 5, 16))
LAYERS, TOKENS, V = 2, 60, 7


@functools.cache
def spanned(level, generators):
    return frozenset(
        span(
            child_generators(LEVELS[level - 1][0], LEVELS[level][0], LEVELS[level][2], generators)
        ).tolist()
    )


def is_child(level, generators, parent, child):
    """The definition: child = parent ⊕ u with u in the span of the level's generators, among the
    ids that the level owns.
    """
    owned = parent in level_range(LEVELS, level - 1) and child in level_range(LEVELS, level)
    return owned and parent ^ child in spanned(level, generators)


@pytest.fixture(scope="module", params=["spread", "prefix"])
def drawn(request):
    """Firings in which every child was selected with a parent: (generators, ids [L, N, A],
    activations [L, N, A]).
    """
    rng = np.random.default_rng(0)
    families = [Family.of(LEVELS, level, request.param) for level in (1, 2)]
    ids = np.zeros((LAYERS, TOKENS, sum(k for _, k, _ in LEVELS)), np.int32)
    for row in ids.reshape(-1, ids.shape[-1]):
        chosen, start = rng.choice(2 ** LEVELS[0][0], LEVELS[0][1], replace=False), 0
        row[: LEVELS[0][1]] = chosen
        for (_, k, _), family in zip(LEVELS[1:], families, strict=True):
            start += len(chosen)
            candidates = np.unique(
                [child for parent in chosen for child in family.children_of(parent)]
            )
            chosen = rng.choice(candidates, k, replace=False)
            row[start : start + k] = chosen
    # with ties and zeros
    activations = np.maximum(rng.normal(1, 1, ids.shape), 0).round(1).astype(np.float32)
    return request.param, ids, activations


def counted(generators, ids, activations):
    """The counts, from batches of unequal sizes."""
    firing = FiringCounts(LEVELS, generators, LAYERS)
    for layer, rows in itertools.product(
        range(LAYERS), (slice(0, 13), slice(13, 14), slice(14, TOKENS))
    ):
        firing.add(layer, ids[layer, rows], activations[layer, rows])
    return firing


@pytest.mark.parametrize("generators", ["spread", "prefix"])
@pytest.mark.parametrize("level", [1, 2])
def test_relatives_are_those_of_the_definition(generators, level):
    family = Family.of(LEVELS, level, generators)
    parents, children = level_range(LEVELS, level - 1), level_range(LEVELS, level)
    for parent in parents:
        assert sorted(family.children_of(parent)) == [
            c for c in children if is_child(level, generators, parent, c)
        ]
    for child in children[::7]:
        assert family.parents_of(child).tolist() == [
            p for p in parents if is_child(level, generators, p, child)
        ]


def test_counts_equal_loops(drawn):
    generators, ids, activations = drawn
    firing = counted(*drawn)
    counts, sums, pairs = Counter(), Counter(), Counter()
    for layer, token in np.ndindex(LAYERS, TOKENS):
        row = ids[layer, token].tolist()
        for i, feature in enumerate(row):
            counts[layer, feature] += 1
            sums[layer, feature] += float(activations[layer, token, i])
        for parent, child in itertools.product(row, row):
            if any(is_child(level, generators, parent, child) for level in (1, 2)):
                pairs[layer, parent, child] += 1
    for layer, feature in np.ndindex(LAYERS, 2**8):
        assert firing.counts[layer, feature] == counts[layer, feature]
        assert firing.sums[layer, feature] == pytest.approx(sums[layer, feature])
    found = Counter()
    for layer, level in itertools.product(range(LAYERS), (1, 2)):
        for child in level_range(LEVELS, level):
            parents, together = firing.parents(layer, level, child)
            found |= {
                (layer, int(parent), child): int(n)
                for parent, n in zip(parents, together, strict=True)
                if n
            }
        from_above = {
            (layer, parent, int(child)): int(n)
            for parent in level_range(LEVELS, level - 1)
            for child, n in zip(*firing.children(layer, level - 1, parent), strict=True)
            if n
        }
        assert from_above == {
            key: n
            for key, n in found.items()
            if key[0] == layer and key[2] in level_range(LEVELS, level)
        }
    assert found == pairs


def closest(ids, together):
    """The one that fired most often with a feature, the lowest of equals; none where none did."""
    ranked = sorted((-int(n), int(i)) for i, n in zip(ids, together, strict=True) if n)
    return {ranked[0][1]} if ranked else set()


@pytest.mark.parametrize("per_level", [1, 6, 7])
def test_chosen_are_those_that_fire_most_some_others_and_their_closest_relatives(drawn, per_level):
    firing = counted(*drawn)
    for layer in range(LAYERS):
        want = []
        for level in range(3):
            ranked = sorted(level_range(LEVELS, level), key=lambda i: (-firing.counts[layer, i], i))
            ranked = [i for i in ranked if firing.counts[layer, i]]
            half = per_level // 2
            rest = ranked[per_level - half :]
            places = [round(i * (len(rest) - 1) / max(half - 1, 1)) for i in range(half)]
            want.append({*ranked[: per_level - half], *(rest[place] for place in places)})
            assert len(want[-1]) == per_level
        for level in (0, 1):
            for parent in set(want[level]):
                want[level + 1] |= closest(*firing.children(layer, level, parent))
        for level in (2, 1):
            for child in set(want[level]):
                want[level - 1] |= closest(*firing.parents(layer, level, child))
        assert choose(firing, layer, per_level) == [sorted(ids) for ids in want]


def test_few_fired_are_all_chosen():
    firing = FiringCounts(LEVELS, "prefix", 1)
    row = [1, 2, 3, 17, 18, 19, 33, 81, 82, 83, 97, 145]
    firing.add(0, np.array([row]), np.ones((1, len(row))))
    assert choose(firing, 0, 100) == [row[:3], row[3:7], row[7:]]
    assert choose(firing, 0, 1) == [[1], [17], [81]]


def test_one_level_has_no_relatives():
    firing = FiringCounts(LEVELS[:1], "spread", 1)
    firing.add(0, np.array([[1, 2, 3], [1, 5, 2]]), np.ones((2, 3)))
    assert choose(firing, 0, 2) == [[1, 2]]


def test_examples_equal_loops(drawn):
    _, ids, activations = drawn
    rng = np.random.default_rng(1)
    tokens, positions = rng.integers(0, V, TOKENS).astype(np.uint16), 100 + np.arange(TOKENS)
    chosen = [
        (layer, int(feature)) for layer in range(LAYERS) for feature in np.unique(ids[layer])[::3]
    ]
    examples = Examples(chosen, (LAYERS, 2**8), per_feature=4)
    for rows, layer in itertools.product(
        (slice(0, 20), slice(20, 21), slice(21, TOKENS)), range(LAYERS)
    ):
        examples.add(
            layer, ids[layer, rows], activations[layer, rows], tokens[rows], positions[rows]
        )
    for place, (layer, feature) in enumerate(chosen):
        fired = [
            (t, i)
            for t in range(TOKENS)
            for i in range(ids.shape[-1])
            if ids[layer, t, i] == feature
        ]
        want = sorted((-float(activations[layer, t, i]), 100 + t) for t, i in fired)[:4]
        strongest, at = examples.strongest(place)
        assert [(-float(c), int(p)) for c, p in zip(strongest, at, strict=True)] == want
        by_token = Counter(int(tokens[t]) for t, _ in fired)
        want = sorted(
            ((token, n) for token, n in by_token.items()), key=lambda pair: (-pair[1], pair[0])
        )
        assert [(int(t), int(n)) for t, n in zip(*examples.tokens(place), strict=True)] == want
