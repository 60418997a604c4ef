"""The operation in plain jax, for any accelerator and the CPU. `reference` defines it.

Level 0 is one Walsh-Hadamard transform. The parents of later levels fall into groups with the same
children (`dictionary.children`). v_{f⊕u} = √d · v_f · v_u elementwise. So the scores of a group's
children are a product with a ±1 matrix that all groups share. The other factor is x with the signs
of the group's representative. The code scores x itself, and the mean enters through offsets:
y_f = ⟨x, v_f⟩/σ_f + (b_f - ⟨m, v_f⟩/σ_f). The products of a bfloat16 x with ±1 are then exact.

The code runs over chunks of tokens. Beside tables [F] it needs the memory of one chunk's
candidates. Legend: C tokens per chunk, k selected features per level, A over all levels, d the
width, F = 2^n_last features.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.dictionary import Scheme
from sngpt_kernels.cayley.reference import STD_FLOOR

CPU_CHUNK_BYTES = 8 * 2**20  # about a core's share of the caches
# On other devices a chunk is enough work for a GPU and small beside a step's activations.
CHUNK_BYTES = 2**30
ACTIVE_BIT = 30  # A saved id has this bit set if c > 0.
# A GPU's default precision would round the float32 factor of ±1 to TF32.
EXACT = lax.Precision.HIGHEST


def _chunks(rows: int, bytes_per_row: int, budget: int) -> tuple[int, int]:
    """(chunks, rows per chunk): the fewest even chunks within the budget, at least one."""
    chunks = max(1, -(-rows // max(1, budget // bytes_per_row)))
    return chunks, -(-rows // chunks)


def _map_rows(
    function: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    bytes_per_row: int,
) -> tuple[jax.Array, ...]:
    """function(*arrays) by chunks of the leading axis, which all arrays and results share."""

    def run(budget: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        rows = arrays[0].shape[0]
        chunks, size = _chunks(rows, bytes_per_row, budget)
        if chunks == 1:
            return function(*arrays)
        missing = chunks * size - rows  # filled by copies of the last row
        padded = [
            jnp.concatenate([a, jnp.broadcast_to(a[-1:], (missing, *a.shape[1:]))]) for a in arrays
        ]
        results = lax.map(
            lambda chunk: function(*chunk),
            tuple(a.reshape(chunks, size, *a.shape[1:]) for a in padded),
        )
        return tuple(r.reshape(chunks * size, *r.shape[2:])[:rows] for r in results)

    return lax.platform_dependent(
        *arrays, cpu=partial(run, CPU_CHUNK_BYTES), default=partial(run, CHUNK_BYTES)
    )


def signs(ids: jax.Array, d: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The atoms of `ids` [...] times √d: ±1 [..., d]."""
    w = dictionary.trace_masks(d) & (2**dictionary.MAX_BITS - 1)
    ids, w = jnp.expand_dims(ids, -1), jnp.asarray(w.reshape((1,) * ids.ndim + (d,)), jnp.int32)
    return 1 - 2 * (lax.population_count(ids & w) & 1).astype(dtype)


def _hadamard_matrix(n: int) -> jax.Array:
    index = np.arange(n)
    return jnp.asarray(1 - 2 * (np.bitwise_count(index[:, None] & index) & 1).astype(np.float32))


def hadamard(x: jax.Array) -> jax.Array:
    """The unnormalized Walsh-Hadamard transform of the last axis of [..., d], float32.

    d is a power of two. H_d = H_p ⊗ H_q gives two matrix products.
    """
    t = x.shape[-1].bit_length() - 1
    p, q = 2 ** (t // 2), 2 ** (t - t // 2)
    grid = x.astype(jnp.float32).reshape(*x.shape[:-1], p, q)
    matrices = _hadamard_matrix(p), _hadamard_matrix(q)
    return jnp.einsum("...pq,ap,bq->...ab", grid, *matrices, precision=EXACT).reshape(x.shape)


def _high_signs(d: int, n_last: int) -> jax.Array:
    """The sign masks: `signs` of the features 0, d, 2d, …, float32 [2^n_last / d, d]."""
    return signs(jnp.arange(0, 2**n_last, d, dtype=jnp.int32), d)


def all_scores(x: jax.Array, n_last: int) -> jax.Array:
    """⟨x, v_f⟩ for every f < 2^n_last: x [..., d] → float32 [..., 2^n_last].

    It does not chunk, so it suits a few vectors.
    """
    d = x.shape[-1]
    high = _high_signs(d, n_last).reshape((1,) * (x.ndim - 1) + (-1, d))
    flipped = x.astype(jnp.float32)[..., None, :] * high
    return hadamard(flipped).reshape(*x.shape[:-1], 2**n_last) / np.float32(np.sqrt(d))


def sum_squared_scores(x: jax.Array, n_last: int) -> jax.Array:
    """Σ ⟨x, v_f⟩² over the rows of x [N, d] for every f < 2^n_last: float32 [2^n_last].

    It needs memory for N × d numbers.
    """
    d = x.shape[-1]
    x = x.astype(jnp.float32)

    def of(high: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(hadamard(x * high[None])), 0)

    return lax.map(of, _high_signs(d, n_last)).reshape(-1) / d


def _score_at(x: jax.Array, ids: jax.Array) -> jax.Array:
    """⟨x, v_id⟩: x [C, d], ids [C, A] → float32 [C, A]. Products in x's dtype are exact."""
    d = x.shape[-1]
    sums = jnp.einsum(
        "cd,cad->ca", x, signs(ids, d, x.dtype), precision=EXACT, preferred_element_type=jnp.float32
    )
    return sums / np.float32(np.sqrt(d))


def _combine(coefficients: jax.Array, atom_signs: jax.Array) -> jax.Array:
    """Σ coefficient · v: coefficients [C, A], signs of atoms [C, A, d] → float32 [C, d]."""
    scaled = coefficients / np.float32(np.sqrt(atom_signs.shape[-1]))
    return jnp.einsum("ca,cad->cd", scaled, atom_signs, precision=EXACT)


def scores_at(x: jax.Array, ids: jax.Array) -> jax.Array:
    """⟨x, v_id⟩ for some features of each vector: x [..., d], ids [..., A] → float32 [..., A]."""
    d, active = x.shape[-1], ids.shape[-1]
    rows = x.reshape(-1, d), ids.reshape(-1, active)
    (scores,) = _map_rows(lambda *chunk: (_score_at(*chunk),), rows, 4 * active * d)
    return scores.reshape(ids.shape)


def combine(coefficients: jax.Array, ids: jax.Array, d: int) -> jax.Array:
    """Σ coefficient · v_id per token: coefficients and ids [..., A] → float32 [..., d]."""
    active = ids.shape[-1]
    rows = coefficients.reshape(-1, active), ids.reshape(-1, active)
    (sums,) = _map_rows(lambda c, ids: (_combine(c, signs(ids, d)),), rows, 4 * active * d)
    return sums.reshape(*ids.shape[:-1], d)


class _Tables(NamedTuple):
    """The coefficients of y_f = scale · sum + offset, and of the unstandardized score.

    The sum of a feature f is Σ_α x_α (±1).
    """

    scale: jax.Array  # [F]: 1 / (√d max(σ_f, floor))
    offset: jax.Array  # [F]: b_f - ⟨m, v_f⟩ / max(σ_f, floor)
    raw_offset: jax.Array  # [F]: b_f - ⟨m, v_f⟩


def _tables(mean: jax.Array, std: jax.Array, bias: jax.Array, n_last: int) -> _Tables:
    d = mean.shape[-1]
    inverse = 1 / jnp.maximum(std, STD_FLOOR)
    mean_scores = all_scores(mean, n_last)
    return _Tables(
        inverse / np.float32(np.sqrt(d)), bias - mean_scores * inverse, bias - mean_scores
    )


def _finite_or_inf(y: jax.Array) -> jax.Array:
    """y with +inf for NaN and ±inf, so that max(y, 0) cannot hide a token that is not finite."""
    return jnp.where(jnp.isfinite(y), y, jnp.inf)


def _select(
    y: jax.Array, k: int, ids: Callable[[], jax.Array], allowed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k largest of y [C, N] in each row: their values and positions [C, k].

    Of equal values the lower id wins. A y that is not finite counts as +inf and is returned as
    +inf. Positions that are not allowed are never taken. `top_k` knows no ids. If it omits a value
    equal to the last one taken, which is rare, a second pass over the chunk takes the equal values
    with the lowest of ids() [C, N].
    """
    keys = _finite_or_inf(y)
    if allowed is not None:
        keys = jnp.where(allowed, keys, -jnp.inf)
    values, positions = lax.top_k(keys, k)
    # The CPU's compiler would sort instead of a top_k if a slice took the last value.
    last = jnp.min(values, axis=1, keepdims=True)
    tied = jnp.sum(keys == last, axis=1, keepdims=True) > jnp.sum(
        values == last, axis=1, keepdims=True
    )

    def by_id() -> jax.Array:
        equal = jnp.where(keys == last, 2**dictionary.MAX_BITS - ids(), -1)
        lowest = lax.top_k(jnp.where(keys > last, jnp.iinfo(jnp.int32).max, equal), k)[1]
        # A token's order, and so its rounding, must not depend on its chunk.
        return jnp.where(tied, lowest, positions)

    positions = lax.cond(jnp.any(tied), by_id, lambda: positions)
    return jnp.take_along_axis(keys, positions, axis=1), positions


def _encode_chunk(
    x: jax.Array, tables: _Tables, scheme: Scheme
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [C, d] → (x_hat [C, d], ids [C, A], c > 0 [C, A])."""
    rows, d = x.shape
    sums = hadamard(x)
    y = sums * tables.scale[None, :d] + tables.offset[None, :d]

    def roots() -> jax.Array:
        return jnp.broadcast_to(jnp.arange(d, dtype=jnp.int32), (rows, d))

    y, ids = _select(y, scheme.levels[0][1], roots)
    all_ids, all_y, all_sums = [ids], [y], [jnp.take_along_axis(sums, ids, axis=1)]
    for level, (_, k, _) in enumerate(scheme.levels[1:], 1):
        table = scheme.children(level)
        representatives, steps = jnp.asarray(table.representatives), jnp.asarray(table.steps)
        child_ids = representatives[:, None] ^ steps[None, :]  # [groups, members]
        groups = jnp.asarray(table.group_of_parent)[ids]  # [C, k]
        earlier = np.tri(groups.shape[1], k=-1, dtype=bool)[None]
        # [C, k]: whether an earlier parent is in the same group
        repeated = jnp.any((groups[:, :, None] == groups[:, None, :]) & earlier, axis=2)

        flipped = x[:, None, :] * signs(representatives[groups], d, x.dtype)
        matrix = jnp.asarray(dictionary.signs(table.steps, d).T, x.dtype)
        sums = jnp.einsum(
            "ckd,dm->ckm", flipped, matrix, precision=EXACT, preferred_element_type=jnp.float32
        )
        y = sums * tables.scale[child_ids][groups] + tables.offset[child_ids][groups]
        allowed = jnp.broadcast_to(~repeated[:, :, None], y.shape)

        flat = (rows, groups.shape[1] * len(table.steps))  # one row of candidates per token
        candidates = partial(_candidate_ids, child_ids, groups, flat)
        y, positions = _select(y.reshape(flat), k, candidates, allowed.reshape(flat))
        parent, member = jnp.divmod(positions, len(table.steps))
        ids = representatives[jnp.take_along_axis(groups, parent, axis=1)] ^ steps[member]
        all_ids.append(ids)
        all_y.append(y)
        all_sums.append(jnp.take_along_axis(sums.reshape(flat), positions, axis=1))
    ids, c = jnp.concatenate(all_ids, axis=1), jnp.concatenate(all_y, axis=1)
    if not scheme.forward_standardized:
        raw = jnp.concatenate(all_sums, axis=1) / np.float32(np.sqrt(d)) + tables.raw_offset[ids]
        c = jnp.where(jnp.isfinite(c), _finite_or_inf(raw), c)
    c = jnp.maximum(c, 0)
    return _combine(c, signs(ids, d)).astype(x.dtype), ids, c > 0


def _candidate_ids(child_ids: jax.Array, groups: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """child_ids [groups, members] of groups [C, k], in the shape [C, k · members]."""
    return child_ids[groups].reshape(shape)


def _bytes_per_token(scheme: Scheme, itemsize: int) -> int:
    """About the size of one token's largest intermediates."""
    most = 4 * scheme.active * scheme.width  # the signs of the selected atoms
    for level in range(1, len(scheme.levels)):
        parents, members = scheme.levels[level - 1][1], len(scheme.children(level).steps)
        most = max(most, parents * (scheme.width * itemsize + 4 * 4 * members))
    return most


def _forward(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, scheme: Scheme
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tables = _tables(mean, std, bias, scheme.levels[-1][0])
    results = _map_rows(
        lambda chunk: _encode_chunk(chunk, tables, scheme),
        (x.reshape(-1, scheme.width),),
        _bytes_per_token(scheme, x.dtype.itemsize),
    )
    x_hat, ids, active = (r.reshape(*x.shape[:-1], r.shape[-1]) for r in results)
    return x_hat, ids, active


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def encode_decode(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, scheme: Scheme
) -> tuple[jax.Array, jax.Array]:
    """`api.encode_decode` of valid arguments."""
    return _forward(x, mean, std, bias, scheme)[:2]


def _encode_decode_fwd(
    x: jax.Array, mean: jax.Array, std: jax.Array, bias: jax.Array, scheme: Scheme
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    x_hat, ids, active = _forward(x, mean, std, bias, scheme)
    saved = ids | active.astype(jnp.int32) << ACTIVE_BIT
    return (x_hat, ids), (saved, std if scheme.forward_standardized else None)


def _encode_decode_bwd(
    scheme: Scheme,
    residuals: tuple[jax.Array, jax.Array | None],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None, jax.Array]:
    saved, std = residuals
    dx_hat, _ = cotangents  # ids carry none
    d, active = scheme.width, scheme.active

    def chunk(dx_hat: jax.Array, saved: jax.Array) -> tuple[jax.Array, ...]:
        ids = saved & (2**ACTIVE_BIT - 1)
        g = jnp.where(saved >> ACTIVE_BIT == 1, _score_at(dx_hat, ids), 0)
        divided = g if std is None else g / jnp.maximum(std, STD_FLOOR)[ids]
        return _combine(divided, signs(ids, d)).astype(dx_hat.dtype), g

    dx, g = _map_rows(chunk, (dx_hat.reshape(-1, d), saved.reshape(-1, active)), 4 * active * d)
    ids = saved.reshape(-1, active) & (2**ACTIVE_BIT - 1)
    dbias = jnp.zeros(scheme.features, jnp.float32).at[ids].add(g)
    return dx.reshape(dx_hat.shape), None, None, dbias


encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)
