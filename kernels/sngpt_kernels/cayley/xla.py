"""The operation in plain jax, for any accelerator and the CPU. `reference` defines it.

Level 0 is one Walsh-Hadamard transform. The parents of later levels fall into groups with the same
children (`dictionary.children`). v_{f⊕u} = √d · v_f · v_u elementwise. So the scores of a group's
children are a product of x, with the signs of the group's representative, and a ±1 matrix that all
groups share. The code scores x itself, so that products of a bfloat16 are exact. The mean enters
through offsets: y_f = ⟨x, v_f⟩/σ_f + (b_f - ⟨m, v_f⟩/σ_f).

Legend: C tokens per chunk, k selected features per level, A over all levels, d the width,
F = 2^n_last features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.dictionary import STD_FLOOR, Scheme

CPU_CHUNK_BYTES = 8 * 2**20  # about a core's share of the caches
# On other devices a chunk is enough work for a GPU and small beside a step's activations.
CHUNK_BYTES = 2**30
ACTIVE_BIT = 30  # A saved id has this bit set if c > 0.
ID_MASK = 2**ACTIVE_BIT - 1
# A GPU's default precision would round the float32 factor of ±1 to TF32.
EXACT = lax.Precision.HIGHEST

_product = partial(jnp.einsum, precision=EXACT, preferred_element_type=jnp.float32)

Code = tuple[Array, Array]  # x_hat and ids
Saved = tuple[Array, Array | None]  # ids with the active bit, and std if the backward pass needs it


def _map_rows(function: Callable[..., Any], arrays: tuple[Array, ...], bytes_per_row: int) -> Any:
    """function(*arrays) by chunks of the leading axis, which all arrays and results share."""

    def run(budget: int, *arrays: Array) -> Any:
        rows = arrays[0].shape[0]
        chunks = -(-rows // max(1, budget // bytes_per_row))
        if chunks <= 1:
            return function(*arrays)
        size = -(-rows // chunks)
        missing = chunks * size - rows  # filled by copies of the last row
        padded = [
            jnp.concatenate([a, jnp.broadcast_to(a[-1:], (missing, *a.shape[1:]))]) for a in arrays
        ]
        chunked = tuple(a.reshape(chunks, size, *a.shape[1:]) for a in padded)
        results = lax.map(lambda chunk: function(*chunk), chunked)
        return jax.tree.map(lambda r: r.reshape(chunks * size, *r.shape[2:])[:rows], results)

    return lax.platform_dependent(
        *arrays, cpu=partial(run, CPU_CHUNK_BYTES), default=partial(run, CHUNK_BYTES)
    )


def signs(ids: Array, d: int, dtype: jnp.dtype = jnp.float32) -> Array:
    """The atoms of `ids` [...] times √d: ±1 [..., d]."""
    w = dictionary.trace_masks(d) & (2**dictionary.MAX_BITS - 1)
    ids, w = jnp.expand_dims(ids, -1), jnp.asarray(w.reshape((1,) * ids.ndim + (d,)), jnp.int32)
    return 1 - 2 * (lax.population_count(ids & w) & 1).astype(dtype)


def hadamard(x: Array) -> Array:
    """The unnormalized Walsh-Hadamard transform of the last axis of [..., d], float32."""
    # H_d = H_p ⊗ H_q gives two products.
    t = x.shape[-1].bit_length() - 1
    p, q = 2 ** (t // 2), 2 ** (t - t // 2)
    grid = x.astype(jnp.float32).reshape(*x.shape[:-1], p, q)
    matrices = [jnp.asarray(dictionary.hadamard(n).astype(np.float32)) for n in (p, q)]
    return jnp.einsum("...pq,ap,bq->...ab", grid, *matrices, precision=EXACT).reshape(x.shape)


def _high_signs(d: int, n_last: int) -> Array:
    """The sign masks: `signs` of the features 0, d, 2d, …, float32 [2^n_last / d, d]."""
    return signs(jnp.arange(0, 2**n_last, d, dtype=jnp.int32), d)


def all_scores(x: Array, n_last: int) -> Array:
    """⟨x, v_f⟩ for every f < 2^n_last, without chunks: x [..., d] → float32 [..., 2^n_last]."""
    d = x.shape[-1]
    high = _high_signs(d, n_last).reshape((1,) * (x.ndim - 1) + (-1, d))
    flipped = x.astype(jnp.float32)[..., None, :] * high
    return hadamard(flipped).reshape(*x.shape[:-1], 2**n_last) / np.float32(np.sqrt(d))


def sum_squared_scores(x: Array, n_last: int) -> Array:
    """Σ ⟨x, v_f⟩² over the rows of x [..., N, d] for every f < 2^n_last: float32 [..., 2^n_last].

    The sum is v_f C v_f with C = xᵀx. With f = (high, low), d v_f[α] v_f[α ⊕ δ] is the sign of δ
    in v_f times (-1)^popc(ℓ & α), and ℓ depends on (high, δ) alone (`dictionary.derivatives`). So
    a Walsh-Hadamard transform of C along α ⊕ δ holds all sums over α, and another one along δ
    holds all f. Rounding errors are relative to the mean over f, not to each sum.
    """
    d = x.shape[-1]
    x = x.astype(jnp.float32)
    c = jnp.einsum("...na,...nb->...ab", x, x, precision=EXACT).reshape(*x.shape[:-2], d * d)
    delta, alpha = (lax.broadcasted_iota(jnp.int32, (d, d), axis) for axis in range(2))
    sums = hadamard(jnp.take(c, alpha * d + (alpha ^ delta), axis=-1)).reshape(c.shape)
    rows = np.arange(d, dtype=np.int32)[None] * d
    of_high = jnp.take(sums, rows + dictionary.derivatives(d, n_last), axis=-1)
    signed = of_high * _high_signs(d, n_last).reshape((1,) * (x.ndim - 2) + (-1, d))
    squares = hadamard(signed).reshape(*x.shape[:-2], 2**n_last) / d
    return jnp.maximum(squares, 0)  # rounding


def _score_at(x: Array, ids: Array) -> Array:
    """⟨x, v_id⟩: x [C, d], ids [C, A] → float32 [C, A]. Products in x's dtype are exact."""
    d = x.shape[-1]
    sums = _product("cd,cad->ca", x, signs(ids, d, x.dtype))
    return sums / np.float32(np.sqrt(d))


def _combine(coefficients: Array, ids: Array, d: int) -> Array:
    """Σ coefficient · v_id: coefficients and ids [C, A] → float32 [C, d]."""
    atom_signs = signs(ids, d)
    scaled = coefficients / np.float32(np.sqrt(d))
    return jnp.einsum("ca,cad->cd", scaled, atom_signs, precision=EXACT)


def scores_at(x: Array, ids: Array) -> Array:
    """⟨x, v_id⟩ for some features of each vector: x [..., d], ids [..., A] → float32 [..., A]."""
    d, active = x.shape[-1], ids.shape[-1]
    rows = x.reshape(-1, d), ids.reshape(-1, active)
    return _map_rows(_score_at, rows, 4 * active * d).reshape(ids.shape)


def combine(coefficients: Array, ids: Array, d: int) -> Array:
    """Σ coefficient · v_id per token: coefficients and ids [..., A] → float32 [..., d]."""
    active = ids.shape[-1]
    rows = coefficients.reshape(-1, active), ids.reshape(-1, active)
    sums = _map_rows(partial(_combine, d=d), rows, 4 * active * d)
    return sums.reshape(*ids.shape[:-1], d)


class _Tables(NamedTuple):
    """The coefficients [F] of y_f = scale · Σ_α x_α (±1) + offset."""

    scale: Array  # 1 / (√d max(σ_f, floor))
    offset: Array  # b_f - ⟨m, v_f⟩ / max(σ_f, floor)
    raw_offset: Array  # of the unstandardized score: b_f - ⟨m, v_f⟩


def _tables(mean: Array, std: Array, bias: Array, n_last: int) -> _Tables:
    inverse = 1 / jnp.maximum(std, STD_FLOOR)
    mean_scores = all_scores(mean, n_last)
    scale = inverse / np.float32(np.sqrt(mean.shape[-1]))
    return _Tables(scale, bias - mean_scores * inverse, bias - mean_scores)


def _finite_or_inf(y: Array) -> Array:
    """y with +inf for NaN and ±inf, so that max(y, 0) cannot hide a token that is not finite."""
    return jnp.where(jnp.isfinite(y), y, jnp.inf)


def _select(
    y: Array, k: int, ids: Callable[[], Array], allowed: Array | None = None
) -> tuple[Array, Array]:
    """The k largest of y [C, N] in each row: their values and positions [C, k].

    Of equal values the lower of ids() [C, N] wins. A y that is not finite counts as +inf. Positions
    that are not allowed are never taken. `top_k` knows no ids. If it omits a value equal to the
    last one taken, which is rare, a second pass over the chunk decides.
    """
    keys = _finite_or_inf(y)
    if allowed is not None:
        keys = jnp.where(allowed, keys, -jnp.inf)
    values, positions = lax.top_k(keys, k)
    # With a slice for the last value, the CPU's compiler would sort instead of a top_k.
    last = jnp.min(values, axis=1, keepdims=True)
    equal, taken = (jnp.sum(a == last, axis=1, keepdims=True) for a in (keys, values))
    tied = equal > taken

    def by_id() -> Array:
        equal = jnp.where(keys == last, 2**dictionary.MAX_BITS - ids(), -1)
        lowest = lax.top_k(jnp.where(keys > last, jnp.iinfo(jnp.int32).max, equal), k)[1]
        # A token's order, and so its rounding, must not depend on its chunk.
        return jnp.where(tied, lowest, positions)

    positions = lax.cond(jnp.any(tied), by_id, lambda: positions)
    return jnp.take_along_axis(keys, positions, axis=1), positions


_Selected = tuple[Array, Array, Array]  # ids, y and Σ_α x_α (±1) of a level's features [C, k]


def _roots(x: Array, tables: _Tables, scheme: Scheme) -> _Selected:
    rows, d = x.shape
    sums = hadamard(x)
    y = sums * tables.scale[None, :d] + tables.offset[None, :d]

    def every_id() -> Array:
        return jnp.broadcast_to(jnp.arange(d, dtype=jnp.int32), (rows, d))

    y, ids = _select(y, scheme.levels[0][1], every_id)
    return ids, y, jnp.take_along_axis(sums, ids, axis=1)


def _children(x: Array, parents: Array, tables: _Tables, scheme: Scheme, level: int) -> _Selected:
    rows, d = x.shape
    table = scheme.children(level)
    representatives, steps = jnp.asarray(table.representatives), jnp.asarray(table.steps)
    child_ids = representatives[:, None] ^ steps[None, :]  # [groups, members]
    groups = jnp.asarray(table.group_of_parent)[parents]
    earlier = np.tri(groups.shape[1], k=-1, dtype=bool)[None]
    # whether an earlier parent is in the same group
    repeated = jnp.any((groups[:, :, None] == groups[:, None, :]) & earlier, axis=2)

    flipped = x[:, None, :] * signs(representatives[groups], d, x.dtype)
    matrix = jnp.asarray(dictionary.signs(table.steps, d).T, x.dtype)
    sums = _product("ckd,dm->ckm", flipped, matrix)
    y = sums * tables.scale[child_ids][groups] + tables.offset[child_ids][groups]
    allowed = jnp.broadcast_to(~repeated[:, :, None], y.shape)

    flat = (rows, groups.shape[1] * len(table.steps))  # one row of candidates per token
    y, positions = _select(
        y.reshape(flat),
        scheme.levels[level][1],
        lambda: child_ids[groups].reshape(flat),
        allowed.reshape(flat),
    )
    parent, member = jnp.divmod(positions, len(table.steps))
    ids = representatives[jnp.take_along_axis(groups, parent, axis=1)] ^ steps[member]
    return ids, y, jnp.take_along_axis(sums.reshape(flat), positions, axis=1)


def _encode_chunk(x: Array, tables: _Tables, scheme: Scheme) -> tuple[Array, Array, Array]:
    """x [C, d] → (x_hat [C, d], ids [C, A], c > 0 [C, A])."""
    d = scheme.width
    selected = [_roots(x, tables, scheme)]
    for level in range(1, len(scheme.levels)):
        selected.append(_children(x, selected[-1][0], tables, scheme, level))
    all_ids, all_y, all_sums = zip(*selected, strict=True)
    ids, c = jnp.concatenate(all_ids, axis=1), jnp.concatenate(all_y, axis=1)
    if not scheme.forward_standardized:
        raw = jnp.concatenate(all_sums, axis=1) / np.float32(np.sqrt(d)) + tables.raw_offset[ids]
        c = jnp.where(jnp.isfinite(c), _finite_or_inf(raw), c)
    c = jnp.maximum(c, 0)
    return _combine(c, ids, d).astype(x.dtype), ids, c > 0


def _bytes_per_token(scheme: Scheme, itemsize: int) -> int:
    """About the size of one token's largest intermediates."""
    sizes = [4 * scheme.active * scheme.width]  # the signs of the selected atoms
    for level, (_, parents, _) in enumerate(scheme.levels[:-1], 1):
        members = len(scheme.children(level).steps)
        sizes.append(parents * (scheme.width * itemsize + 4 * 4 * members))
    return max(sizes)


def _forward(
    x: Array, mean: Array, std: Array, bias: Array, scheme: Scheme
) -> tuple[Array, Array, Array]:
    tables = _tables(mean, std, bias, scheme.levels[-1][0])
    results = _map_rows(
        lambda chunk: _encode_chunk(chunk, tables, scheme),
        (x.reshape(-1, scheme.width),),
        _bytes_per_token(scheme, x.dtype.itemsize),
    )
    x_hat, ids, active = (r.reshape(*x.shape[:-1], r.shape[-1]) for r in results)
    return x_hat, ids, active


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def encode_decode(x: Array, mean: Array, std: Array, bias: Array, scheme: Scheme) -> Code:
    """`api.encode_decode` of valid arguments."""
    return _forward(x, mean, std, bias, scheme)[:2]


def _encode_decode_fwd(
    x: Array, mean: Array, std: Array, bias: Array, scheme: Scheme
) -> tuple[Code, Saved]:
    x_hat, ids, active = _forward(x, mean, std, bias, scheme)
    saved = ids | active.astype(jnp.int32) << ACTIVE_BIT
    return (x_hat, ids), (saved, std if scheme.forward_standardized else None)


def _encode_decode_bwd(
    scheme: Scheme, residuals: Saved, cotangents: Code
) -> tuple[Array, None, None, Array]:
    saved, std = residuals
    dx_hat, _ = cotangents  # ids carry none
    d, active = scheme.width, scheme.active

    def chunk(dx_hat: Array, saved: Array) -> tuple[Array, Array]:
        ids = saved & ID_MASK
        g = jnp.where(saved >> ACTIVE_BIT == 1, _score_at(dx_hat, ids), 0)
        divided = g if std is None else g / jnp.maximum(std, STD_FLOOR)[ids]
        return _combine(divided, ids, d).astype(dx_hat.dtype), g

    dx, g = _map_rows(chunk, (dx_hat.reshape(-1, d), saved.reshape(-1, active)), 4 * active * d)
    ids = saved.reshape(-1, active) & ID_MASK
    dbias = jnp.zeros(scheme.features, jnp.float32).at[ids].add(g)
    return dx.reshape(dx_hat.shape), None, None, dbias


encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)
