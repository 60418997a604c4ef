"""Random permutations, in the order of grain's `index_shuffle` with 4 rounds.

grain enciphers an index until the result is below `count`. Its blocks have at least 16 bits, so a
small `count` takes many rounds of the cipher per index. Up to 2^16 items, this module enciphers all
blocks of 16 bits at once instead, and finds the ends of all walks together.

The cipher is Simon (Beaulieu et al. 2013, https://eprint.iacr.org/2013/404) with other keys.
"""

import functools

import grain
import numpy as np

_LEAST = 2**16  # blocks of grain's smallest cipher
_ROUNDS = 4
_TABLES = 4  # of epochs, 128 KiB each: a batch is read in one epoch, or goes on in the next one


def permuted(index: int, count: int, seed: int) -> int:
    """The place of `index` in the permutation of `count` items that `seed` < 2^32 draws."""
    if count <= _LEAST:
        return int(_table(count, seed)[index])
    if index == count - 1 and _is_power_of_four(index):
        return index  # grain's blocks have a bit too few for this index
    return grain.experimental.index_shuffle(index, max_index=count - 1, seed=seed, rounds=_ROUNDS)


def _is_power_of_four(number: int) -> bool:
    return number.bit_count() == 1 and number.bit_length() % 2 == 1


@functools.lru_cache(maxsize=_TABLES)
def _table(count: int, seed: int) -> np.ndarray:
    """The whole permutation of `count` ≤ 2^16 items, uint16 [count]."""
    words = np.arange(256)
    rotated = {by: words << by | words >> (8 - by) for by in (1, 2)}  # by 8: the word itself
    mixed = ((rotated[1] & words) ^ rotated[2]).astype(np.uint8)
    left, right = (half.astype(np.uint8).ravel() for half in np.indices((256, 256)))
    keys = _round_keys(seed)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left ^= mixed[right] ^ first
        right ^= mixed[left] ^ second
    after = left.astype(np.intp) << 8 | right
    ends = np.where(np.arange(_LEAST) < count, np.arange(_LEAST), after)
    while np.any((found := ends[after[:count]]) >= count):  # these blocks are no items, and go on
        ends = ends[ends]  # twice as far
    return found.astype(np.uint16)


def _round_keys(seed: int) -> np.ndarray:
    """The keys of the rounds, uint8: the low bytes of what C++'s `std::seed_seq{seed}` generates
    (ISO C++ [rand.util.seedseq]).
    """
    n, wrap = _ROUNDS, 2**32
    state = [0x8B8B8B8B] * n
    for k in range(2 * n):
        before, here, then, last = (k - 1) % n, k % n, (k + 1) % n, (k + 2) % n
        if k < n:
            mixed = state[here] ^ state[then] ^ state[before]
            first = 1664525 * (mixed ^ mixed >> 27) % wrap
            second = first + (1 if k == 0 else here + seed * (k == 1))
            state[then], state[last] = state[then] + first, state[last] + second
        else:
            mixed = (state[here] + state[then] + state[before]) % wrap
            first = 1566083941 * (mixed ^ mixed >> 27) % wrap
            second = first - here
            state[then], state[last] = state[then] ^ first, state[last] ^ second % wrap
        state[here] = second
        state = [word % wrap for word in state]
    return np.array([word % 256 for word in state], np.uint8)
