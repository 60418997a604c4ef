"""What an artifact costs and loses, by group of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sngpt_jax.artifact.codecs import entropy
from sngpt_jax.artifact.file import Encoded
from sngpt_jax.artifact.policy import policy_of
from sngpt_jax.artifact.quantize import Quantized, Stored, dequantize
from sngpt_jax.config import Config


@dataclass(frozen=True)
class GroupReport:
    """One group's tensors of one width. Bits are a weight."""

    group: str
    width: str  # int5 …, float16, float32
    tensors: int
    weights: int
    bytes: float  # in the artifact, scales included
    entropy: float | None  # of the codes, each tensor by its own frequencies; None without a grid
    coded: float  # in the artifact, scales included
    scales: float  # 16 bits a row, before compression
    # what packing adds to `coded`, against the same codes a byte each; 0 where they are
    packing_loss: float
    error: float  # Σ (w - ŵ)² / Σ w²


def report(
    original: Mapping[str, np.ndarray],
    stored: Mapping[str, Stored],
    encoded: Encoded,
    config: Config,
    unpacked: Encoded | None = None,
) -> list[GroupReport]:
    """A line for each group and width. `unpacked`: the same tensors with a byte a code, where
    `encoded` packs them.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for name, tensor in stored.items():
        width = f"int{tensor.bits}" if isinstance(tensor, Quantized) else tensor.dtype.name
        lines.setdefault((policy_of(name, tensor.shape, config).group, width), []).append(name)
    return [
        _line(group, width, names, original, stored, encoded, unpacked)
        for (group, width), names in sorted(lines.items())
    ]


def _line(
    group: str,
    width: str,
    names: list[str],
    original: Mapping[str, np.ndarray],
    stored: Mapping[str, Stored],
    encoded: Encoded,
    unpacked: Encoded | None,
) -> GroupReport:
    weights = sum(original[name].size for name in names)
    codes = {name: tensor for name in names if isinstance(tensor := stored[name], Quantized)}
    size = sum(encoded.tensor_bytes[name] for name in names)
    scales = 2 * sum(len(tensor.scales) for tensor in codes.values())
    squares = [squared_error(original[name], stored[name]) for name in names]
    return GroupReport(
        group=group,
        width=width,
        tensors=len(names),
        weights=weights,
        bytes=size,
        entropy=sum(map(entropy_of, codes.values())) / weights if codes else None,
        coded=8 * size / weights,
        scales=8 * scales / weights,
        packing_loss=(
            8 * (size - sum(unpacked.tensor_bytes[name] for name in names)) / weights
            if unpacked
            else 0.0
        ),
        error=sum(error for error, _ in squares)
        / max(sum(total for _, total in squares), np.finfo(float).tiny),
    )


def entropy_of(tensor: Quantized) -> float:
    """Bits of all the codes together, by the frequencies of the tensor's codes."""
    return entropy(tensor.codes) * tensor.codes.size


def squared_error(original: np.ndarray, stored: Stored) -> tuple[float, float]:
    """Σ (w - ŵ)² and Σ w², float64."""
    difference = original - dequantize(stored)
    return float(np.square(difference, dtype=np.float64).sum()), float(
        np.square(original, dtype=np.float64).sum()
    )


def relative_error(original: Mapping[str, np.ndarray], stored: Mapping[str, Stored]) -> float:
    """The mean over all weights of their tensor's relative squared error, so that no tensor's unit
    counts.
    """
    total = 0.0
    for name, tensor in original.items():
        error, square = squared_error(tensor, stored[name])
        total += tensor.size * error / square if square else 0.0
    return total / sum(tensor.size for tensor in original.values())


def as_json(lines: Sequence[GroupReport]) -> dict[str, dict[str, Any]]:
    """`lines` by group, and by width where a group has several."""
    several = {
        line.group for line in lines if sum(other.group == line.group for other in lines) > 1
    }
    return {
        f"{line.group}_{line.width}" if line.group in several else line.group: asdict(line)
        for line in lines
    }


def format_table(lines: Sequence[GroupReport]) -> str:
    """`lines` for a person."""
    head = (
        "group",
        "kept as",
        "tensors",
        "weights",
        "entropy",
        "coded",
        "scales",
        "packing",
        "bytes",
        "rel. MSE",
    )
    rows = [
        (
            line.group,
            line.width,
            str(line.tensors),
            f"{line.weights:,}",
            "" if line.entropy is None else f"{line.entropy:.3f}",
            f"{line.coded:.3f}",
            f"{line.scales:.3f}",
            f"{line.packing_loss:+.3f}",
            f"{line.bytes:,.0f}",
            f"{line.error:.2e}",
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )
