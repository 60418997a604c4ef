"""Weights on a grid: one float16 scale for each row, times small whole numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sngpt_jax.artifact.policy import SMALLEST_SCALE, Policy, largest_code
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import ExportConfig

# Percentiles of a row's magnitudes that `clip = search` tries, from the public Parameter Golf
# script that introduced it.
CANDIDATES = (99.9, 99.95, 99.99, 100.0)

BLOCK = 2**17  # weights worked on at a time, so that what is made of them stays in a core's cache


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
        return 2 ** (self.bits - 1) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor."""
        rows, columns = self.codes.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def dequantize(self) -> np.ndarray:
        """The tensor, float32 of `shape`, C-contiguous: float32(scale) · code, exactly rounded
        once.
        """
        rows = self.scales.astype(np.float32)[:, None] * self.codes
        return np.ascontiguousarray(rows.T) if self.transposed else rows


# what an artifact holds of a tensor: codes and scales, or float16 or float32 as it is
Stored = Quantized | np.ndarray


def dequantize(stored: Stored) -> np.ndarray:
    """The tensor in float32, in its own shape."""
    return stored.dequantize() if isinstance(stored, Quantized) else stored.astype(np.float32)


def quantize(tensor: np.ndarray, policy: Policy, export: ExportConfig) -> Quantized:
    """The float32 tensor [in, out] or [entries, width] on the grid that its policy asks for, each
    weight on its nearest code.

    Raises `UserError`, which does not name the tensor, for weights that are not finite or exceed
    what the grid can hold.
    """
    rows = tensor.T if policy.transposed else tensor
    scales = row_scales(rows, policy, export)
    q_min, q_max = code_range(policy.bits, export.codes)
    return Quantized(
        nearest_codes(rows, scales, q_min, q_max), scales, policy.bits, q_min, policy.transposed
    )


def code_range(bits: int, codes: Literal["symmetric", "full"]) -> tuple[int, int]:
    """The least and the largest code: -q and q, or -q - 1 and q."""
    q = largest_code(bits)
    return (-q if codes == "symmetric" else -q - 1), q


def row_scales(rows: np.ndarray, policy: Policy, export: ExportConfig) -> np.ndarray:
    """The scales, float16 [rows], of float32 [rows, columns] in any memory order, such as the
    transpose of a matrix.

    scale = float16(max(max(reach, clip_floor) / q, SMALLEST_SCALE)), as `sngpt_jax.optim.qat`
    imitates it. The reach of a row, by the policy's clip, is

    row_max     its largest magnitude
    percentile  the percentile of its magnitudes at export.clip_percentile, interpolated linearly
    search      the one of `CANDIDATES` percentiles that leaves the least squared error in the row (GPTQ-lite as described), or
                with clip_scope = matrix the one percentile for all rows that leaves the least in the tensor (as it is coded)
    sd          policy.clip_sd times its standard deviation about its mean (SDClip)
    """
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise UserError(
            f"row {row}, column {column} of its grid is {rows[row, column]}; export a step before"
            " it diverged"
        )
    reach = np.concatenate([_reach(rows[block], policy, export) for block in _blocks(rows)], axis=1)
    scales = _scales(reach, policy, export)
    return _least_error(rows, scales, policy, export) if len(scales) > 1 else scales[0]


def nearest_codes(rows: np.ndarray, scales: np.ndarray, q_min: int, q_max: int) -> np.ndarray:
    """int8 [rows, columns], C-contiguous: round(rows / scale) with halves to even, held within
    q_min … q_max.

    `rows` are float32, `scales` [rows] float16. Within the grid's range a code is at most half a
    scale from its weight. Weights on the grid get their own codes back.
    """
    codes = np.empty(rows.shape, np.int8)
    inverses = inverse(scales)[:, None]
    for block in _blocks(rows):
        codes[block] = _rounded(rows[block] * inverses[block], q_min, q_max)
    return codes


def inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale, float32 of the scales' shape.

    XLA turns the division in training into a product with it: so do we, and ties go the same way.
    """
    return np.float32(1) / scales.astype(np.float32)


def prune(tensor: np.ndarray, fraction: float) -> np.ndarray:
    """A copy with the floor(fraction · size) weights of least magnitude set to 0; of equal ones
    the first, in C order.
    """
    pruned = tensor.copy()
    count = int(fraction * tensor.size)
    if count:
        magnitudes = np.abs(tensor).ravel()
        largest = np.partition(magnitudes, count - 1)[count - 1]
        below = magnitudes < largest
        below[np.flatnonzero(magnitudes == largest)[: count - np.count_nonzero(below)]] = True
        pruned[below.reshape(tensor.shape)] = 0
    return pruned


def _blocks(rows: np.ndarray) -> Iterator[slice]:
    """Runs of rows of about `BLOCK` weights."""
    step = max(1, BLOCK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _reach(rows: np.ndarray, policy: Policy, export: ExportConfig) -> np.ndarray:
    """float32 [candidates, rows]: several candidates for `clip = search`, else one."""
    if policy.clip == "row_max":
        return np.abs(rows).max(axis=1)[None]
    if policy.clip == "sd":
        # contiguous: numpy sums pairwise along rows only
        return np.float32(policy.clip_sd) * np.ascontiguousarray(rows).std(axis=1)[None]
    return _percentiles(rows, CANDIDATES if policy.clip == "search" else (export.clip_percentile,))


def _percentiles(rows: np.ndarray, percentiles: Sequence[float]) -> np.ndarray:
    """Of each row's magnitudes, float32 [percentiles, rows], as numpy's linear method defines
    them.
    """
    positions = [percentile / 100 * (rows.shape[1] - 1) for percentile in percentiles]
    lowest = int(min(positions))
    # one partition, then a sort of the few magnitudes above: several times faster than np.quantile
    top = np.partition(np.abs(rows, order="C"), lowest, axis=1)[:, lowest:]
    top.sort(axis=1)
    result = np.empty((len(percentiles), len(rows)), np.float32)
    for i, position in enumerate(positions):
        below = int(position)
        low, high = top[:, below - lowest], top[:, min(below - lowest + 1, top.shape[1] - 1)]
        result[i] = low + (high - low) * np.float32(position - below)
    return result


def _scales(reach: np.ndarray, policy: Policy, export: ExportConfig) -> np.ndarray:
    """float16 [candidates, rows] from reaches, float32."""
    q = largest_code(policy.bits)
    reach = np.maximum(reach, np.float32(export.clip_floor))
    with np.errstate(over="ignore"):  # float16 overflows to infinity, an error below
        scales = np.maximum(reach * np.float32(1 / q), np.float32(SMALLEST_SCALE)).astype(
            np.float16
        )
    if not np.isfinite(scales).all():
        raise UserError(
            f"a row of its grid needs the range {reach.max():.4g}, and {policy.bits} bits with a"
            f" float16 scale end at {q} · 65504; export a step before it diverged, or lower"
            " clip_floor or the standard deviations to clip at"
        )
    return scales


def _least_error(
    rows: np.ndarray, candidates: np.ndarray, policy: Policy, export: ExportConfig
) -> np.ndarray:
    """float16 [rows]: of the candidates, float16 [candidates, rows], those of least squared error,
    in doubt the first.
    """
    errors = np.empty(candidates.shape, np.float64)  # of each row
    q_min, q_max = code_range(policy.bits, export.codes)
    for block in _blocks(rows):
        weights = np.ascontiguousarray(rows[block])
        for i, scales in enumerate(candidates[:, block]):
            # as where clip_floor decides
            if i and np.array_equal(scales, candidates[i - 1, block]):
                errors[i, block] = errors[i - 1, block]
                continue
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
