"""Decodes an artifact and scores it. All that a byte budget counts besides the artifact:
`bundle.py` packs this command, with what it needs of the project, into one file, `python model.pyz
model.sngpt --data DIR`.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from sngpt_jax.artifact.policy import is_exported
from sngpt_jax.base.cli import run, write_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.evaluation.bpb import Score, score_validation
from sngpt_jax.weights.trained_model import TrainedModel, from_artifact


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Decodes an artifact, and scores it in bits a byte."
    )
    parser.add_argument("artifact", type=Path, help="exported model, *.sngpt")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with validation shards and their tokenizer; default: score nothing",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        help="score so many tokens from the start of the stream; 0: all",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help="score in sliding windows that advance by it; 0: standard ones",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens} is negative; 0 scores all of the stream")
    model = from_artifact(arguments.artifact, make_mesh())
    exported = [leaf for leaf in jax.tree.leaves(model.variables) if is_exported(leaf.dtype)]
    result: dict[str, Any] = {
        "step": model.step,
        "weights": model.weights,
        "tensors": len(exported),
        "parameters": sum(leaf.size for leaf in exported),
    }
    if arguments.data:
        result |= asdict(_score(model, arguments.data, arguments.tokens, arguments.stride))
    if arguments.json:
        write_json(result, "-")
    else:
        print(", ".join(f"{name} {value}" for name, value in result.items()))
    return 0


def _score(model: TrainedModel, data: Path, tokens: int, stride: int) -> Score:
    dataset = model.open_data(data)
    score = score_validation(
        model.config, model.variables, dataset, make_mesh(), tokens, _progress(), stride
    )
    if not math.isfinite(score.loss):
        raise UserError(f"{model.source}: its loss is {score.loss}; export other weights")
    return score


def _progress() -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() > last + 2:
            print(f"{done} of {total} rows of windows", file=sys.stderr)
            last = time.monotonic()

    return report


if __name__ == "__main__":
    run(main)
