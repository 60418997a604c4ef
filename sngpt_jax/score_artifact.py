"""Decodes an artifact and scores it. Export packs this command, with the modules that it imports,
into one file, `python model.pyz model.sngpt --data DIR`. A byte budget counts that file.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import at_home


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Decodes an artifact and scores it in bits per byte."
    )
    parser.add_argument("artifact", type=_path, help="exported model, *.sngpt")
    data_help = "folder with validation shards and their tokenizer; default: score nothing"
    parser.add_argument("--data", type=_path, help=data_help)
    for option, help_text in (
        ("--tokens", "number of tokens to score, from the start of the stream; 0 scores all"),
        ("--stride", "tokens by which sliding windows advance; 0 scores in standard windows"),
    ):
        parser.add_argument(option, type=int, default=0, help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens} is negative; 0 scores the whole stream")
    result = _result(arguments.artifact, arguments.data, arguments.tokens, arguments.stride)
    if arguments.json:
        cli.write_json(result, "-")
    else:
        print(", ".join(f"{name} {value}" for name, value in result.items()))
    return 0


def _path(text: str) -> Path:
    return Path(at_home(text))


def _result(artifact: Path, data: Path | None, tokens: int, stride: int) -> dict[str, Any]:
    # jax takes seconds to import, which --help does not need
    import jax

    from sngpt_jax.artifact.policy import is_exported
    from sngpt_jax.cluster.mesh import make_mesh
    from sngpt_jax.evaluation.bpb import score_validation
    from sngpt_jax.weights.trained_model import from_artifact

    mesh = make_mesh()
    model = from_artifact(artifact, mesh)
    exported = [leaf for leaf in jax.tree.leaves(model.variables) if is_exported(leaf.dtype)]
    result = {
        "step": model.step,
        "weights": model.weights,
        "tensors": len(exported),
        "parameters": sum(leaf.size for leaf in exported),
    }
    if data is None:
        return result
    validation = model.open_data(data), mesh, tokens, _progress(), stride
    score = score_validation(model.config, model.variables, *validation)
    if not math.isfinite(score.loss):
        raise UserError(f"{artifact}: its loss is {score.loss}; export other weights")
    return result | asdict(score)


def _progress() -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() > last + 2:
            cli.progress(f"{done} of {total} rows of windows")
            last = time.monotonic()

    return report


if __name__ == "__main__":
    cli.run(main)
