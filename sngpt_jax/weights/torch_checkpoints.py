"""Checkpoints of the original PyTorch scripts (parameter-golf submissions 333, 465, 740 and 1573)
and models of this project, converted in both directions.

The scripts' linear weights are [out, in]; this project's are [in, out]. In 1573 the blocks'
matrices are stacked into four banks. `tensors_of` is the one table of corresponding names.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic, write_text_atomic
from sngpt_jax.cluster.mesh import leaves_by_path, make_mesh
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.model.gpt import GPT
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run.checkpoint import Checkpointer, step_folder, steps
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.weights.state_dict_files import InteropError, read_state_dict
from sngpt_jax.weights.trained_model import TrainedModel

logger = logging.getLogger("sngpt_jax")

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Part:
    """A part of a parameter here, and the scripts' tensor, or entry of a bank, that holds it."""

    path: str  # of the parameter here
    name: str  # of the scripts' tensor
    index: int | slice | EllipsisType = ...  # the part of the parameter
    entry: int | None = None  # the entry of the tensor, for a bank
    transposed: bool = False
    negated: bool = False

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """The part of `parameter`, not copied, in the tensor's layout, without its sign."""
        part = parameter[self.index]
        return part.T if self.transposed else part


# name here and there in a block; bank there, and whether in the bank's second half
_MATRICES = (
    ("attn/query", "attn.c_q.weight", "qo_bank", False),
    ("attn/key", "attn.c_k.weight", "kv_bank", False),
    ("attn/value", "attn.c_v.weight", "kv_bank", True),
    ("attn/out", "attn.proj.weight", "qo_bank", True),
    ("mlp/up", "mlp.fc.weight", "mlp_up_bank", False),
    ("mlp/down", "mlp.proj.weight", "mlp_down_bank", False),
)


def tensors_of(config: ModelConfig, banked: bool) -> Iterator[Part]:
    """Every part of the parameters of `config` with its tensor in the scripts, for `banked` in
    1573's layout.
    """
    yield Part("embed/table", "tok_emb.weight")
    if config.num_skips:
        yield Part("skip_weights", "skip_weights")
    if config.smear == "after_norm":
        yield Part("smear/gate", "smear.gate")
    if config.smear == "before_norm":  # 740's gate is the share of the current position
        yield Part("smear/gate", "smear_gate", negated=True)
    if config.bigram_buckets:
        bigram = {"xor": "bigram", "sum": "bigram_hash"}[config.bigram_hash]
        yield Part("bigram/table", f"{bigram}.embed.weight")
        yield Part("bigram/proj", f"{bigram}.proj.weight", transposed=True)
        if config.bigram_scale_init:
            yield Part("bigram/scale", f"{bigram}.scale")
    if config.value_embed_layers:
        yield Part("value_embed/table", "ve_shared.embed.weight")
        yield Part("value_embed/proj", "ve_shared.proj.weight", transposed=True)
        yield Part("value_embed/scale", "ve_shared.scale")
    for j in range(len(config.value_embed_layers)):
        yield Part("value_embed/layer_scale", f"ve_layer_scales.{j}", slice(j, j + 1))
    for j in range(len(config.recycle_layers)):
        for name in ("scale", "bias"):
            yield Part(f"recycle/{name}", f"recycle_mods.{j}.{name}", j)
    for i in range(config.num_layers):
        ours, theirs = f"blocks/{i}", f"blocks.{i}"
        for name in ("attn_scale", "mlp_scale", "resid_mix"):
            yield Part(f"{ours}/{name}", f"{theirs}.{name}")
        yield Part(f"{ours}/attn/q_gain", f"{theirs}.attn.q_gain")
        if config.attention_gate:
            gate = f"{theirs}.attn.attn_gate"
            yield Part(f"{ours}/attn/gate_weight", f"{gate}.weight", transposed=True)
            yield Part(f"{ours}/attn/gate_bias", f"{gate}.bias")
        if config.value_residual:
            yield Part(f"{ours}/attn/value_mix", f"{theirs}.attn.vr_lambda")
        for matrix, tensor, bank, second_half in _MATRICES:
            entry = i + config.num_layers * second_half if banked else None
            name = bank if banked else f"{theirs}.{tensor}"
            yield Part(f"{ours}/{matrix}", name, entry=entry, transposed=True)


def _problems(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        if name not in state:
            yield f"{name} {list(shape)} is missing"
            continue
        if (found := tuple(state[name].shape)) != shape:
            yield f"{name} has shape {list(found)}, expected {list(shape)}"
        if str(state[name].dtype) not in DTYPES:
            yield f"{name} is {state[name].dtype}, expected one of {', '.join(DTYPES)}"
    for name in state:
        if name not in expected:
            yield f"{name} {list(state[name].shape)} is not a tensor of this model"


def _abstract(config: ModelConfig) -> GPT:
    """The model with shapes for its parameters. Raises `InteropError` for another family."""
    if config.family != "compact":
        raise InteropError(f"model.family = {config.family}: the scripts' models are compact")
    return nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(params=jax.random.key(0))))


def import_state_dict(state: Mapping[str, Any], model_config: ModelConfig) -> GPT:
    """The model of `model_config`, in float32, with the weights of one of the scripts' checkpoints.

    `state`: numpy or jax arrays of float16, bfloat16, float32 or float64 by the scripts' names. The
    layout is 1573's if `qo_bank` is among the names. Raises `InteropError`, which lists the tensors
    that are missing, unknown, of another shape or dtype, or not finite.
    """
    graph, abstract = nnx.split(_abstract(model_config))
    tree = nnx.to_pure_dict(abstract)
    params = {path: np.empty(leaf.shape, np.float32) for path, leaf in leaves_by_path(tree).items()}
    table = list(tensors_of(model_config, banked="qo_bank" in state))
    expected: dict[str, tuple[int, ...]] = {}
    for c in table:
        shape = c.view(params[c.path]).shape
        if c.entry is not None:  # a bank is as long as its last entry says
            shape = (max(c.entry + 1, expected.get(c.name, (0,))[0]), *shape)
        expected[c.name] = shape
    if problems := list(_problems(state, expected)):
        raise InteropError(f"not a checkpoint of the configured model: {'; '.join(problems)}")
    broken: dict[str, None] = {}
    for c in table:
        tensor = state[c.name] if c.entry is None else state[c.name][c.entry]
        with np.errstate(over="ignore"):  # overflow to infinity is an error below
            tensor = np.asarray(tensor).astype(np.float32)
        if not np.isfinite(tensor).all():
            broken[c.name] = None
        c.view(params[c.path])[...] = -tensor if c.negated else tensor
    if broken:
        raise InteropError(f"not finite in float32: {', '.join(broken)}")
    leaves = [jnp.asarray(leaf) for leaf in params.values()]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(tree), leaves))


def export_state_dict(model: GPT) -> dict[str, np.ndarray]:
    """The weights of `model` under the scripts' names, float32 and contiguous. The layout is 1573's
    for a model with parts that only 1573 has, else the other scripts'.
    """
    m = model.config
    banked = bool(m.attention_gate or m.value_residual or m.value_embed_layers or m.recycle_layers)
    params = leaves_by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    entries: dict[str, dict[int | None, np.ndarray]] = defaultdict(dict)
    for c in tensors_of(m, banked):
        part = np.array(c.view(np.asarray(params[c.path])), np.float32, order="C")
        entries[c.name][c.entry] = np.negative(part, out=part) if c.negated else part
    return {
        name: found[None] if None in found else np.stack([found[i] for i in range(len(found))])
        for name, found in entries.items()
    }


def export_file(trained: TrainedModel, out: Path) -> dict[str, np.ndarray]:
    """Writes a model's weights to the safetensors file `out`; returns them."""
    model = nnx.merge(nnx.graphdef(_abstract(trained.config.model)), trained.variables)
    state = export_state_dict(model)
    write_bytes_atomic(out, safetensors.numpy.save(state))
    return state


def import_run(file: Path, config: Config, run_dir: Path, tokenizer: str = "") -> Path:
    """Makes `run_dir` a run of `config` at step 0 with the weights of `file`; returns the folder of
    its checkpoint. The run keeps the tokenizer in the file `tokenizer`; "" stands for the tokenizer
    of the recipe's data. An import that was killed is done again. Raises `InteropError` if `file`
    does not fit, or if the run has checkpoints.
    """
    kept, state = _tokenizer(tokenizer, config), read_state_dict(file)
    try:
        model = import_state_dict(state, config.model)
    except InteropError as error:
        raise InteropError(f"{file}: {error}") from None
    folder = run_directory.checkpoint_dir(run_dir)
    with run_directory.claim(run_dir, config):
        mark = run_directory.imported_path(run_dir)
        left = folder.is_dir() and any(folder.iterdir())
        if steps(folder) or (left and not mark.exists()):
            raise InteropError(f"{folder}: holds checkpoints already; choose another --run-dir")
        # first: a training in what a killed import leaves must not start from drawn weights
        write_text_atomic(mark, json.dumps({"file": str(file)}) + "\n")
        run_directory.begin(run_dir, config, kept)
        with Checkpointer(folder, keep=config.train.keep_checkpoints) as checkpoints:
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            shapes = Shapes.of(config, make_mesh(jax.devices()[:1]))  # restored to any devices
            checkpoints.save(0, init_state(shapes, params), extra={"imported": True})
    return step_folder(folder, 0)


def _tokenizer(file: str, config: Config) -> Tokenizer | None:
    """The tokenizer in `file`, or else of the recipe's data. None without data."""
    if not file:
        try:
            return open_dataset(config.data.dir, config.model.vocab_size).tokenizer
        except UserError as error:
            logger.warning(
                f"the run will keep no tokenizer, which sampling needs: give --tokenizer ({error})"
            )
            return None
    tokenizer, rows = load_tokenizer(file), config.model.vocab_size
    if tokenizer.vocab_size > rows:
        expected = f"expected at most model.vocab_size = {rows} tokens"
        raise UserError(f"{file}: {expected}, found {tokenizer.vocab_size}")
    return tokenizer
