"""The size and the error of an artifact by group of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sngpt_jax.artifact.codecs import entropy
from sngpt_jax.artifact.policy import policy_of
from sngpt_jax.artifact.quantize import Quantized, Stored, dequantize
from sngpt_jax.artifact.sngpt_file import Encoded
from sngpt_jax.config import Config


@dataclass(frozen=True)
class GroupReport:
    """The tensors of one group and one width. All bits are bits per weight."""

    group: str
    width: str  # int5 …, float16, float32
    tensors: int
    weights: int
    bytes: float  # in the artifact, scales included
    entropy: float | None  # bits of the codes, by each tensor's frequencies; None without a grid
    coded: float  # bits in the artifact, scales included
    scales: float  # bits of the scales before compression, 16 per row
    # bits that packing adds to `coded`, compared with one byte per code; 0 for unpacked codes
    packing_loss: float
    error: float  # Σ (w - ŵ)² / Σ w²


# The heading of each column of the table for a person, and the format of its cells.
_COLUMNS = {
    "group": "{0.group}",
    "kept as": "{0.width}",
    "tensors": "{0.tensors}",
    "weights": "{0.weights:,}",
    "entropy": "{0.entropy:.3f}",
    "coded": "{0.coded:.3f}",
    "scales": "{0.scales:.3f}",
    "packing": "{0.packing_loss:+.3f}",
    "bytes": "{0.bytes:,.0f}",
    "rel. MSE": "{0.error:.2e}",
}


def report(
    original: Mapping[str, np.ndarray],
    stored: Mapping[str, Stored],
    encoded: Encoded,
    config: Config,
    unpacked: Encoded | None = None,
) -> list[GroupReport]:
    """One report per group and width. `unpacked`: the same tensors with one byte per code, if
    `encoded` packs them.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, tensor in stored.items():
        width = f"int{tensor.bits}" if isinstance(tensor, Quantized) else tensor.dtype.name
        found.setdefault((policy_of(name, tensor.shape, config).group, width), []).append(name)

    def report_of(group: str, width: str, names: list[str]) -> GroupReport:
        codes = [tensor for name in names if isinstance(tensor := stored[name], Quantized)]
        weights = sum(original[name].size for name in names)
        size = sum(encoded.tensor_bytes[name] for name in names)
        unpacked_size = sum(unpacked.tensor_bytes[name] for name in names) if unpacked else size
        errors, squares = np.sum(
            [squared_error(original[name], stored[name]) for name in names], axis=0
        )
        return GroupReport(
            group=group,
            width=width,
            tensors=len(names),
            weights=weights,
            bytes=size,
            entropy=sum(map(entropy_of, codes)) / weights if codes else None,
            coded=8 * size / weights,
            scales=16 * sum(len(tensor.scales) for tensor in codes) / weights,
            packing_loss=8 * (size - unpacked_size) / weights,
            error=float(errors / max(squares, np.finfo(float).tiny)),
        )

    return [report_of(*key, names) for key, names in sorted(found.items())]


def entropy_of(tensor: Quantized) -> float:
    """Bits of all codes of the tensor together, by the frequencies of its codes."""
    return entropy(tensor.codes) * tensor.codes.size


def squared_error(original: np.ndarray, stored: Stored) -> tuple[float, float]:
    """Σ (w - ŵ)² and Σ w², float64."""
    difference = np.square(original - dequantize(stored), dtype=np.float64)
    return float(difference.sum()), float(np.square(original, dtype=np.float64).sum())


def relative_error(original: Mapping[str, np.ndarray], stored: Mapping[str, Stored]) -> float:
    """The mean over all weights of their tensor's relative squared error. The units of the tensors
    cancel.
    """
    total = 0.0
    for name, tensor in original.items():
        error, square = squared_error(tensor, stored[name])
        total += tensor.size * error / square if square else 0.0
    return total / sum(tensor.size for tensor in original.values())


def as_json(lines: Sequence[GroupReport]) -> dict[str, dict[str, Any]]:
    """`lines` by group, and by group and width for a group of several widths."""
    groups = [line.group for line in lines]
    return {
        line.group if groups.count(line.group) == 1 else f"{line.group}_{line.width}": asdict(line)
        for line in lines
    }


def format_table(lines: Sequence[GroupReport]) -> str:
    """`lines` as a table for a person."""
    rows = [list(_COLUMNS)]
    for line in lines:
        rows.append(
            [
                "" if line.entropy is None and heading == "entropy" else cell.format(line)
                for heading, cell in _COLUMNS.items()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<" + ">" * (len(widths) - 2)  # names are aligned left, numbers right
    return "\n".join(
        "  ".join(f"{x:{side}{w}}" for x, side, w in zip(row, sides, widths, strict=True))
        for row in rows
    )
