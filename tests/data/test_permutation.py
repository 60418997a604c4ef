"""Permutations against grain's own, index by index."""

import grain
import numpy as np
import pytest

from sngpt_jax.data import permutation
from sngpt_jax.data.permutation import permuted


def by_grain(index, count, seed):
    return grain.experimental.index_shuffle(index, max_index=count - 1, seed=seed, rounds=4)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
@pytest.mark.parametrize("count", [1, 2, 3, 100, 9_999, 2**16 - 1, 2**16, 2**16 + 2, 10**6])
def test_every_index_has_the_place_that_grain_gives(count, seed):
    random = np.random.default_rng(seed)
    chosen = {0, count - 1, *random.integers(0, count, min(200, 1 + count // 20)).tolist()}
    for index in chosen:
        assert permuted(index, count, seed) == by_grain(index, count, seed)


def test_an_epoch_takes_each_item_once():
    for count in (5, 4_097, 2**16):
        places = [permuted(index, count, 3) for index in range(count)]
        np.testing.assert_array_equal(np.sort(places), np.arange(count))


def test_the_item_that_grain_forgets_keeps_its_place():
    """For 4^k + 1 items grain's blocks have 2k bits, which cannot hold the last index."""
    for last in (4**8, 4**9):
        assert by_grain(last, last + 1, 5) == by_grain(0, last + 1, 5)
        assert permuted(last, last + 1, 5) == last
        assert permuted(0, last + 1, 5) == by_grain(0, last + 1, 5) < last


def test_an_epoch_has_one_table_and_few_are_kept():
    permutation._table.cache_clear()
    for epoch in range(6):
        for index in range(100):
            permuted(index, 100, epoch)
    found = permutation._table.cache_info()
    assert (found.misses, found.currsize) == (6, 4)
    assert permutation._table(2**16, 0).nbytes == 2**17
