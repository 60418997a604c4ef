"""Weights on a grid: one float16 scale for each row, times small whole numbers."""

from dataclasses import dataclass

import numpy as np


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
        """The tensor, float32, C-contiguous: float32(scale) · code, exactly rounded once."""
        rows = self.scales.astype(np.float32)[:, None] * self.codes
        return np.ascontiguousarray(rows.T) if self.transposed else rows
