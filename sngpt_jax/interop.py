"""Checkpoints of the original PyTorch scripts (parameter-golf submissions 333, 465, 740 and 1573),
read and written.

    python -m sngpt_jax.interop import final_model.pt --config golf_12l_recycled --run-dir runs/imported
    python -m sngpt_jax.interop export --run runs/imported --out model.safetensors

The scripts keep a plain dictionary of tensors with linear weights [out, in]; ours are [in, out].
In 1573 the blocks' matrices are stacked into four banks. `tensors_of` is the one table of what
corresponds to what; both directions follow it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from flax import nnx

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.cluster.mesh import make_mesh, path_name
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.config.options import OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.config.recipe import Overrides, parse_command
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.model.gpt import GPT
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run.checkpoint import Checkpointer, step_folder
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.weights.source import open_model
from sngpt_jax.weights.state_dict_files import InteropError, read_state_dict

logger = logging.getLogger("sngpt_jax")

DTYPES = ("float16", "bfloat16", "float32", "float64")


# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Correspondence:
    """A part of one of our parameters and the tensor of the scripts, or the entry of a bank, that
    holds it.
    """

    path: str  # of our parameter
    name: str  # of the scripts' tensor
    index: int | slice | EllipsisType = ...  # which part of our parameter
    entry: OptionalInt = None  # which entry of the tensor, where that is a bank
    transposed: bool = False
    negated: bool = False

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """The part of `parameter`, not copied, in the tensor's layout but with our sign."""
        part = parameter[self.index]
        return part.T if self.transposed else part


# ours in a block; theirs in a block; their bank, and whether it is in the bank's second half
_MATRICES = (
    ("attn/query", "attn.c_q.weight", "qo_bank", False),
    ("attn/key", "attn.c_k.weight", "kv_bank", False),
    ("attn/value", "attn.c_v.weight", "kv_bank", True),
    ("attn/out", "attn.proj.weight", "qo_bank", True),
    ("mlp/up", "mlp.fc.weight", "mlp_up_bank", False),
    ("mlp/down", "mlp.proj.weight", "mlp_down_bank", False),
)


def tensors_of(config: ModelConfig, banked: bool) -> Iterator[Correspondence]:
    """Every part of the parameters of `config` and where the scripts keep it; `banked`: as 1573
    does.
    """
    yield Correspondence("embed/table", "tok_emb.weight")
    if config.num_skips:
        yield Correspondence("skip_weights", "skip_weights")
    if config.smear == "after_norm":
        yield Correspondence("smear/gate", "smear.gate")
    # 740's gate is the share of the current position, ours that of the previous one
    if config.smear == "before_norm":
        yield Correspondence("smear/gate", "smear_gate", negated=True)
    if config.bigram_buckets:
        bigram = {"xor": "bigram", "sum": "bigram_hash"}[config.bigram_hash]
        yield Correspondence("bigram/table", f"{bigram}.embed.weight")
        yield Correspondence("bigram/proj", f"{bigram}.proj.weight", transposed=True)
        if config.bigram_scale_init:
            yield Correspondence("bigram/scale", f"{bigram}.scale")
    if config.value_embed_layers:
        yield Correspondence("value_embed/table", "ve_shared.embed.weight")
        yield Correspondence("value_embed/proj", "ve_shared.proj.weight", transposed=True)
        yield Correspondence("value_embed/scale", "ve_shared.scale")
    for j in range(len(config.value_embed_layers)):
        yield Correspondence(
            "value_embed/layer_scale", f"ve_layer_scales.{j}", index=slice(j, j + 1)
        )
    for j in range(len(config.recycle_layers)):
        yield Correspondence("recycle/scale", f"recycle_mods.{j}.scale", index=j)
        yield Correspondence("recycle/bias", f"recycle_mods.{j}.bias", index=j)
    for i in range(config.num_layers):
        ours, theirs = f"blocks/{i}", f"blocks.{i}"
        for name in ("attn_scale", "mlp_scale", "resid_mix"):
            yield Correspondence(f"{ours}/{name}", f"{theirs}.{name}")
        yield Correspondence(f"{ours}/attn/q_gain", f"{theirs}.attn.q_gain")
        if config.attention_gate:
            yield Correspondence(
                f"{ours}/attn/gate_weight", f"{theirs}.attn.attn_gate.weight", transposed=True
            )
            yield Correspondence(f"{ours}/attn/gate_bias", f"{theirs}.attn.attn_gate.bias")
        if config.value_residual:
            yield Correspondence(f"{ours}/attn/value_mix", f"{theirs}.attn.vr_lambda")
        for matrix, tensor, bank, second_half in _MATRICES:
            if banked:
                entry = i + config.num_layers * second_half
                yield Correspondence(f"{ours}/{matrix}", bank, entry=entry, transposed=True)
            else:
                yield Correspondence(f"{ours}/{matrix}", f"{theirs}.{tensor}", transposed=True)


# ---------------------------------------------------------------------------------------------- both directions


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _problems(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        if name not in state:
            yield f"{name} {_shape(shape)} is missing"
            continue
        if (found := tuple(state[name].shape)) != shape:
            yield f"{name} has shape {_shape(found)}, expected {_shape(shape)}"
        if str(state[name].dtype) not in DTYPES:
            yield f"{name} is {state[name].dtype}, expected one of {', '.join(DTYPES)}"
    for name in state:
        if name not in expected:
            yield f"{name} {_shape(state[name].shape)} is not a tensor of this model"


def _abstract(config: ModelConfig) -> GPT:
    """The model with shapes for its parameters. Raises `InteropError` where none of the scripts
    has such a model.
    """
    if config.family != "compact":
        raise InteropError(
            f"model.family = {config.family}: the scripts' checkpoints are of the compact family"
        )
    return nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(params=jax.random.key(0))))


def import_state_dict(state: Mapping[str, Any], model_config: ModelConfig) -> GPT:
    """The model of `model_config`, in float32, with the weights of one of the scripts' checkpoints.

    Args:
      state: numpy (or jax) arrays of float16, bfloat16, float32 or float64 by the scripts' names. Where `qo_bank` is among
        them the matrices are taken from the banks, otherwise from a tensor each.
      model_config: what the checkpoint is of; shapes alone do not tell its RoPE, activation or XSA layers.

    Raises:
      InteropError: tensors are missing, left over, of another shape, of no float dtype or not finite; it lists them all.
    """
    graph, abstract = nnx.split(_abstract(model_config))
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(abstract))
    params = {path_name(path): np.empty(leaf.shape, np.float32) for path, leaf in leaves}
    table = list(tensors_of(model_config, banked="qo_bank" in state))
    expected: dict[str, tuple[int, ...]] = {}
    for c in table:
        shape = c.view(params[c.path]).shape
        expected[c.name] = (
            shape if c.entry is None else (max(c.entry + 1, expected.get(c.name, (0,))[0]), *shape)
        )
    problems = list(_problems(state, expected))
    if problems:
        raise InteropError(f"not a checkpoint of the configured model: {'; '.join(problems)}")
    broken: dict[str, None] = {}
    for c in table:
        with np.errstate(over="ignore"):  # found below
            tensor = np.asarray(
                state[c.name] if c.entry is None else state[c.name][c.entry]
            ).astype(np.float32)
        if not np.all(np.isfinite(tensor)):
            broken[c.name] = None
        c.view(params[c.path])[...] = -tensor if c.negated else tensor
    if broken:
        raise InteropError(f"not finite in float32: {', '.join(broken)}")
    return nnx.merge(
        graph, jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in params.values()])
    )


def export_state_dict(model: GPT) -> dict[str, np.ndarray]:
    """The weights of `model` under the scripts' names and in their layout, float32 and contiguous.

    The layout is 1573's where the model has a technique of that script alone (attention gate,
    value residual, value embedding, recycled core), and that of the other scripts otherwise.
    """
    m = model.config
    banked = bool(m.attention_gate or m.value_residual or m.value_embed_layers or m.recycle_layers)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    params = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
    entries: dict[str, dict[int | None, np.ndarray]] = defaultdict(dict)
    for c in tensors_of(m, banked):
        part = np.array(c.view(params[c.path]), np.float32, order="C")
        entries[c.name][c.entry] = np.negative(part, out=part) if c.negated else part
    return {
        name: found[None] if None in found else np.stack([found[i] for i in range(len(found))])
        for name, found in entries.items()
    }


# ---------------------------------------------------------------------------------------------- import


def import_run(file: Path, config: Config, run_dir: Path, tokenizer: Tokenizer | None) -> Path:
    """Makes `run_dir` a run of `config` that stands at step 0 with the weights of `file`; returns
    the checkpoint's folder.

    Raises `InteropError` where the file does not fit the model, and where the directory holds
    checkpoints already.
    """
    try:
        model = import_state_dict(read_state_dict(file), config.model)
    except InteropError as error:
        where = "" if str(error).startswith(str(file)) else f"{file}: "
        raise InteropError(f"{where}{error}") from None
    folder = run_directory.checkpoint_dir(run_dir)
    with run_directory.claim(run_dir, config):
        if folder.is_dir() and any(folder.iterdir()):
            raise InteropError(f"{folder}: holds checkpoints already; choose another --run-dir")
        run_directory.begin(run_dir, config, tokenizer)
        with Checkpointer(folder, keep=config.train.keep_checkpoints) as checkpoints:
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            # nothing is computed, and a checkpoint is restored to any devices
            mesh = make_mesh(jax.devices()[:1])
            state = init_state(Shapes.of(config, mesh), params)
            checkpoints.save(0, state, extra={"imported": True})
    return step_folder(folder, 0)


def _tokenizer(file: str, config: Config) -> Tokenizer | None:
    """The tokenizer in `file`; where that is empty, the one of the recipe's data, or None where
    they are not there.
    """
    if not file:
        try:
            return open_dataset(config.data.dir, config.model.vocab_size).tokenizer
        except UserError as error:
            logger.warning(
                f"the run will keep no tokenizer, which sampling needs: give --tokenizer ({error})"
            )
            return None
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size > (rows := config.model.vocab_size):
        raise UserError(
            f"{file}: expected at most model.vocab_size = {rows} tokens, found"
            f" {tokenizer.vocab_size}"
        )
    return tokenizer


@dataclass(frozen=True)
class ImportArguments:
    # recipe of the checkpoint's model: a file, the name of one in configs/, or a run's config.json
    config: str
    overrides: Overrides
    # the checkpoint: .safetensors, .npz, .pt, .pth or .bin
    file: tyro.conf.Positional[Path] = tyro.MISSING
    # run directory to make; training in it goes on from the imported weights
    run_dir: Path = tyro.MISSING
    # a SentencePiece .model or a tokenizer.json to keep with the run; default: that of the
    # recipe's data
    tokenizer: str = ""
    quiet: Quiet = False


def import_command(argv: Sequence[str]) -> int:
    """`interop import`; the exit status."""
    arguments = parse_command(
        ImportArguments,
        argv,
        program="python -m sngpt_jax.interop import",
        description=(
            "Makes a run directory of a checkpoint of the original PyTorch scripts, to evaluate,"
            " sample or train on."
        ),
    )
    cli.log_to_stderr(arguments.quiet)
    config, run_dir = arguments.overrides, arguments.run_dir
    folder = import_run(arguments.file, config, run_dir, _tokenizer(arguments.tokenizer, config))
    score = cli.command("sngpt_jax.evaluate", "--run", str(run_dir), "--weights", "final")
    terminal.show_result(
        "imported", [("from", str(arguments.file)), ("checkpoint", str(folder))], [score]
    )
    return 0


# ---------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class ExportArguments:
    out: Path  # file to write, *.safetensors
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # or an exported model, *.sngpt
    step: OptionalInt = None  # checkpoint to export; default: the latest
    weights: WeightsOption = None
    quiet: Quiet = False


def export_command(argv: Sequence[str]) -> int:
    """`interop export`; the exit status."""
    arguments = tyro.cli(
        ExportArguments,
        args=list(argv),
        prog="python -m sngpt_jax.interop export",
        description="Writes a model's weights under the names of the original PyTorch scripts.",
    )
    out = arguments.out
    if out.suffix != ".safetensors":
        raise InteropError(f"--out {out}: expected a file named *.safetensors")
    cli.log_to_stderr(arguments.quiet)
    trained = open_model(
        arguments.run,
        arguments.artifact,
        make_mesh(jax.devices()[:1]),
        arguments.step,
        arguments.weights,
    )
    state = export_state_dict(
        nnx.merge(nnx.graphdef(_abstract(trained.config.model)), trained.variables)
    )
    try:
        write_bytes_atomic(out, safetensors.numpy.save(state))
    except OSError as error:
        raise InteropError(f"--out {out}: cannot be written: {error.strerror}") from None
    count = sum(tensor.size for tensor in state.values())
    held = (
        f"{len(state)} tensors, {count:,} parameters of step {trained.step}, {trained.weights}"
        " weights"
    )
    terminal.show_result("exported", [("file", str(out)), ("holds", held)])
    return 0


COMMANDS = {"import": import_command, "export": export_command}


def main(argv: Sequence[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(__doc__.strip())
        print("\nEach of the two tells more with --help.")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"expected import or export after sngpt_jax.interop, found {name or 'nothing'}; see"
            " --help"
        )
    return COMMANDS[name](argv[1:])


if __name__ == "__main__":
    cli.run(main)
