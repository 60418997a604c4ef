"""The size and the error of an artifact by group of tensors."""

from collections import defaultdict
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
    packing_loss: float  # bits that packing adds to `coded`, compared with one byte per code
    error: float  # Σ (w - ŵ)² / Σ w²


# heading and cell format of each column
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
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, tensor in stored.items():
        width = f"int{tensor.bits}" if isinstance(tensor, Quantized) else tensor.dtype.name
        found[policy_of(name, tensor.shape, config).group, width].append(name)
    reports = []
    for (group, width), names in sorted(found.items()):
        codes = [tensor for name in names if isinstance(tensor := stored[name], Quantized)]
        weights = sum(original[name].size for name in names)
        size, unpacked_size = (
            sum(x.tensor_bytes[name] for name in names) for x in (encoded, unpacked or encoded)
        )
        pairs = [squared_error(original[name], stored[name]) for name in names]
        errors, squares = np.sum(pairs, axis=0)
        reports.append(
            GroupReport(
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
        )
    return reports


def entropy_of(tensor: Quantized) -> float:
    """Bits of all codes of the tensor together, by the frequencies of its codes."""
    return entropy(tensor.codes) * tensor.codes.size


def squared_error(original: np.ndarray, stored: Stored) -> tuple[float, float]:
    """Σ (w - ŵ)² and Σ w², float64."""
    difference = np.square(original - dequantize(stored), dtype=np.float64)
    return float(difference.sum()), float(np.square(original, dtype=np.float64).sum())


def relative_error(original: Mapping[str, np.ndarray], stored: Mapping[str, Stored]) -> float:
    """The mean over all weights of their tensor's relative squared error, which has no unit."""
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
    columns = []
    for heading, cell in _COLUMNS.items():
        known = [
            "" if heading == "entropy" and x.entropy is None else cell.format(x) for x in lines
        ]
        width = max(map(len, [heading, *known]))
        side = "<" if heading in ("group", "kept as") else ">"
        columns.append([f"{x:{side}{width}}" for x in (heading, *known)])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))
