"""Checkpoints of the original PyTorch scripts (parameter-golf submissions 333, 465, 740 and 1573),
read and written.

    python -m sngpt_jax.interop import final.pt --config golf_12l_recycled --run-dir runs/imported
    python -m sngpt_jax.interop export --run runs/imported --out model.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable
from sngpt_jax.config import PathText
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.config.recipe import Overrides, parse_command

PROGRAM = "python -m sngpt_jax.interop"


@dataclass(frozen=True)
class ImportArguments:
    # recipe of the checkpoint's model: a file, the name of one in configs/, or a run's config.json
    config: PathText
    overrides: Overrides
    # the checkpoint: .safetensors, .npz, .pt, .pth or .bin
    file: tyro.conf.Positional[Path] = tyro.MISSING
    run_dir: Path = tyro.MISSING  # run directory to make; training in it continues from the weights
    # a SentencePiece .model or tokenizer.json to keep with the run; default: the recipe data's
    tokenizer: PathText = ""
    quiet: Quiet = False


def import_command(argv: Sequence[str]) -> int:
    """`interop import`; the exit status."""
    arguments = parse_command(
        ImportArguments,
        argv,
        program=f"{PROGRAM} import",
        description="Makes a run directory from a checkpoint of the original PyTorch scripts.",
    )
    cli.log_to_stderr(arguments.quiet)
    from sngpt_jax.weights.torch_checkpoints import import_run  # imports jax

    file, run_dir = arguments.file, arguments.run_dir
    folder = import_run(file, arguments.overrides, run_dir, arguments.tokenizer)
    score = cli.command("sngpt_jax.evaluate", "--run", str(run_dir), "--weights", "final")
    terminal.show_result("imported", [("from", str(file)), ("checkpoint", str(folder))], [score])
    return 0


@dataclass(frozen=True)
class ExportArguments:
    out: Path  # file to write, *.safetensors
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # exported model, *.sngpt, instead of --run
    step: OptionalInt = None  # checkpoint to export; default: the latest
    weights: WeightsOption = None
    quiet: Quiet = False


def export_command(argv: Sequence[str]) -> int:
    """`interop export`; the exit status."""
    arguments = parse(
        ExportArguments,
        argv,
        program=f"{PROGRAM} export",
        description="Writes a model's weights under the names of the original PyTorch scripts.",
    )
    out = arguments.out
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a file named *.safetensors")
    check_writable(out, "--out")
    cli.log_to_stderr(arguments.quiet)
    import jax  # takes seconds, which --help does not need

    from sngpt_jax.cluster.mesh import make_mesh
    from sngpt_jax.weights.source import open_model
    from sngpt_jax.weights.torch_checkpoints import export_file

    mesh = make_mesh(jax.devices()[:1])
    trained = open_model(arguments.run, arguments.artifact, mesh, arguments.step, arguments.weights)
    state = export_file(trained, out)
    parameters = f"{sum(tensor.size for tensor in state.values()):,} parameters"
    held = f"{len(state)} tensors, {parameters} of step {trained.step}, {trained.weights} weights"
    terminal.show_result("exported", [("file", str(out)), ("holds", held)])
    return 0


COMMANDS = {"import": import_command, "export": export_command}


def main(argv: Sequence[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nBoth commands explain their options with --help.")
        return 0
    if name not in COMMANDS:
        expected = "expected import or export after sngpt_jax.interop"
        raise UserError(f"{expected}, found {name or 'nothing'}; see --help")
    return COMMANDS[name](argv[1:])


if __name__ == "__main__":
    cli.run(main)
