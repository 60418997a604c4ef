"""Weights on a grid: small integers times one float16 scale per row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sngpt_jax.artifact.policy import SMALLEST_SCALE, Policy, largest_code
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import ExportConfig

# the percentiles of a row's magnitudes that `clip = search` tries, from the public script
CANDIDATES = (99.9, 99.95, 99.99, 100.0)
BLOCK = 2**17  # weights per step, so that intermediate results stay in a core's cache


@dataclass(frozen=True, eq=False)
class Quantized:
    """A two-dimensional tensor as codes and scales."""

    codes: np.ndarray  # int8 [rows, columns], each q_min … q_max
    scales: np.ndarray  # float16 [rows]
    bits: int
    q_min: int
    transposed: bool  # the tensor is the transpose of scales · codes

    @property
    def q_max(self) -> int:
        return largest_code(self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (self.codes.T if self.transposed else self.codes).shape


# a tensor in an artifact: codes and scales, or float16 or float32 without a grid
Stored = Quantized | np.ndarray


def dequantize(stored: Stored) -> np.ndarray:
    """The tensor, float32 and C-contiguous. A weight on a grid is float32(scale) · code."""
    if not isinstance(stored, Quantized):
        return stored.astype(np.float32)
    rows = stored.scales.astype(np.float32)[:, None] * stored.codes
    return np.ascontiguousarray(rows.T) if stored.transposed else rows


def quantize(tensor: np.ndarray, policy: Policy, export: ExportConfig) -> Quantized:
    """The float32 tensor [in, out] or [entries, width] on its policy's grid, each weight rounded to
    the nearest code. Raises `UserError`, without the tensor's name, for weights that are not finite
    or beyond the largest grid.
    """
    rows = tensor.T if policy.transposed else tensor
    scales = row_scales(rows, policy, export)
    q_min, q_max = code_range(policy.bits, export.codes)
    codes = nearest_codes(rows, scales, q_min, q_max)
    return Quantized(codes, scales, policy.bits, q_min, policy.transposed)


def code_range(bits: int, codes: Literal["symmetric", "full"]) -> tuple[int, int]:
    """The least and the largest code: -q and q if `symmetric`, -q - 1 and q if `full`."""
    q = largest_code(bits)
    return (-q if codes == "symmetric" else -q - 1), q


def row_scales(rows: np.ndarray, policy: Policy, export: ExportConfig) -> np.ndarray:
    """The scales, float16 [rows], of float32 [rows, columns] in any memory order.

    scale = float16(max(max(reach, clip_floor) / q, SMALLEST_SCALE)); `sngpt_jax.optim.qat` imitates
    this formula. The policy's clip defines the reach of a row:

    row_max     the largest magnitude
    percentile  the percentile export.clip_percentile of the magnitudes, interpolated linearly
    search      the percentile among `CANDIDATES` with the least squared error in the row (GPTQ-lite
                as published), or with clip_scope = matrix in the whole tensor (as its code does)
    sd          policy.clip_sd times the standard deviation about the mean (SDClip)
    """
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        place = f"row {row}, column {column} of its grid"
        raise UserError(f"{place} is {rows[row, column]}; export an earlier --step")
    reach = np.concatenate([_reach(rows[block], policy, export) for block in _blocks(rows)], axis=1)
    reach = np.maximum(reach, np.float32(export.clip_floor))
    q = largest_code(policy.bits)
    exact = np.maximum(reach * np.float32(1 / q), np.float32(SMALLEST_SCALE))
    with np.errstate(over="ignore"):  # overflow to infinity is an error below
        scales = exact.astype(np.float16)
    if not np.isfinite(scales).all():
        raise UserError(
            f"a row needs the range {reach.max():.4g}, but {policy.bits} bits end at {q} · 65504;"
            " export an earlier --step, or lower export.clip_floor or export.clip_sd"
        )
    return _least_error(rows, scales, policy, export) if len(scales) > 1 else scales[0]


def nearest_codes(rows: np.ndarray, scales: np.ndarray, q_min: int, q_max: int) -> np.ndarray:
    """int8 [rows, columns], C-contiguous: round(rows / scale) with halves to even, clamped to q_min
    … q_max. `rows` are float32, `scales` [rows] float16.
    """
    codes = np.empty(rows.shape, np.int8)
    inverses = inverse(scales)[:, None]
    for block in _blocks(rows):
        codes[block] = _rounded(rows[block] * inverses[block], q_min, q_max)
    return codes


def inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale, float32. XLA turns the division in training into a product with the inverse. The
    export multiplies too, so that both round ties alike.
    """
    return np.float32(1) / scales.astype(np.float32)


def prune(tensor: np.ndarray, fraction: float) -> np.ndarray:
    """A copy with the floor(fraction · size) weights of least magnitude set to 0, among equal
    magnitudes the first in C order.
    """
    pruned = tensor.copy()
    if count := int(fraction * tensor.size):
        magnitudes = np.abs(tensor).ravel()
        largest = np.partition(magnitudes, count - 1)[count - 1]
        below = magnitudes < largest
        below[np.flatnonzero(magnitudes == largest)[: count - np.count_nonzero(below)]] = True
        pruned[below.reshape(tensor.shape)] = 0
    return pruned


def _blocks(rows: np.ndarray) -> Iterator[slice]:
    """Slices of rows with about `BLOCK` weights."""
    step = max(1, BLOCK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _reach(rows: np.ndarray, policy: Policy, export: ExportConfig) -> np.ndarray:
    """The reach of each row, float32 [candidates, rows]. Only `clip = search` has several."""
    if policy.clip == "row_max":
        return np.abs(rows).max(axis=1)[None]
    if policy.clip == "sd":
        # contiguous, because numpy sums pairwise along contiguous rows only
        return np.float32(policy.clip_sd) * np.ascontiguousarray(rows).std(axis=1)[None]
    percentiles = CANDIDATES if policy.clip == "search" else (export.clip_percentile,)
    positions = [percentile / 100 * (rows.shape[1] - 1) for percentile in percentiles]
    lowest = int(min(positions))
    # a partition and a sort of the few largest magnitudes are several times faster than np.quantile
    top = np.partition(np.abs(rows, order="C"), lowest, axis=1)[:, lowest:]
    top.sort(axis=1)
    result = np.empty((len(percentiles), len(rows)), np.float32)
    for i, position in enumerate(positions):
        below = int(position)
        low, high = top[:, below - lowest], top[:, min(below - lowest + 1, top.shape[1] - 1)]
        result[i] = low + (high - low) * np.float32(position - below)
    return result


def _least_error(
    rows: np.ndarray, candidates: np.ndarray, policy: Policy, export: ExportConfig
) -> np.ndarray:
    """The first scales of least squared error, float16 [rows], among [candidates, rows]."""
    errors = np.empty(candidates.shape, np.float64)  # squared, per row
    q_min, q_max = code_range(policy.bits, export.codes)
    for block in _blocks(rows):
        weights = np.ascontiguousarray(rows[block])
        for i, scales in enumerate(candidates[:, block]):
            quotients = weights * inverse(scales)[:, None]
            rest = quotients - _rounded(quotients.copy(), q_min, q_max)
            errors[i, block] = np.float64(scales) ** 2 * np.vecdot(rest, rest)
    if export.clip_scope == "matrix":
        return candidates[errors.sum(axis=1).argmin()]
    return np.take_along_axis(candidates, errors.argmin(axis=0)[None], axis=0)[0]


def _rounded(quotients: np.ndarray, q_min: int, q_max: int) -> np.ndarray:
    """The float32 quotients rounded to codes, in place."""
    np.rint(quotients, out=quotients)
    return np.clip(quotients, np.float32(q_min), np.float32(q_max), out=quotients)
