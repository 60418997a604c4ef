"""No setting is dead: every field of a configuration is read, and each that a recipe sets changes
what the recipe does.

A recipe is held against itself with one field set back to the default, for each field in turn.
"""

import ast
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.artifact.fit import storage_of
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.policy import policy_of
from sngpt_jax.artifact.quantize import Quantized
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh, path_name
from sngpt_jax.config import (
    Config,
    DataConfig,
    ExportConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    changed,
    flat,
    microbatches,
)
from sngpt_jax.config.recipe import load
from sngpt_jax.data.loader import batches_of
from sngpt_jax.data.prepared import spec_of
from sngpt_jax.data.shards import Shard, TokenStream
from sngpt_jax.data.tokenizer import NO_CORRECTIONS
from sngpt_jax.evaluation import health
from sngpt_jax.model.attention import make_positions
from sngpt_jax.model.forward import abstract_parts, init_variables, join, losses
from sngpt_jax.optim.groups import groups, make_optimizer
from sngpt_jax.optim.schedules import StepControls, step_controls
from sngpt_jax.training import loop
from sngpt_jax.training.state import Shapes
from sngpt_jax.training.step import make_train_step

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
DEFAULTS = Config()

# Read where this file does not look
SEEN_ELSEWHERE = {
    "eval.byte_count": "tests/data/test_counts.py scores by each count",
    "eval.weights": "tests/run/test_directory.py loads the weights that it names",
    "eval.sample_prompt": "printed at the end of a run; .ci/quickstart looks for it",
    "eval.sample_tokens": "the same",
}


FORMATTED = re.compile(r"getattr\(.*, f['\"](.*)['\"]\)")


def read_names(path: Path) -> Iterator[str]:
    """Attributes that a module reads, as patterns: `.name`, and a formatted text of `getattr`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield re.escape(node.attr)
        elif isinstance(node, ast.Call) and (found := FORMATTED.fullmatch(ast.unparse(node))):
            yield re.sub(r"\{.*?\}", r"\\w+", found[1])


def test_every_field_is_read():
    """Outside of the checks."""
    modules = [path for path in (ROOT / "sngpt_jax").rglob("*.py") if path.name != "checks.py"]
    patterns = {pattern for path in modules for pattern in read_names(path)}
    names = {field: field.partition(".")[2] for field in flat(DEFAULTS)}
    assert [
        field for field, name in names.items() if not any(re.fullmatch(p, name) for p in patterns)
    ] == []


def digest(value: Any) -> str:
    """Of an array's dtype, shape and bytes."""
    array = np.asarray(value)
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def as_text(jaxpr: jax.extend.core.ClosedJaxpr) -> str:
    """A traced program, with what stands for its constants, and no addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join([str(jaxpr), *map(digest, jaxpr.consts)]))


@functools.cache
def model_program(model: ModelConfig, B: int, T: int) -> str:
    """A model's start and the losses [B, T] of it."""

    def start_and_losses(key: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return losses(model)(join(*init_variables(model, key)), tokens_BT, tokens_BT)

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return as_text(jax.make_jaxpr(start_and_losses)(jax.random.key(0), tokens))


def shallow_program(config: Config, *, coded: bool) -> str:
    """Of two layers, or three where the depth is the default, in its training's shape."""
    m, T = config.model, config.data.seq_len
    small = dataclasses.replace(
        m,
        num_layers=3 if m.num_layers == DEFAULTS.model.num_layers else 2,
        xsa_layers=min(m.xsa_layers, 1),
        value_embed_layers=(1,) if m.value_embed_layers else (),
        recycle_layers=(0,) if m.recycle_layers else (),
        levels=m.levels if coded else (),
    )
    return model_program(small, config.train.device_batch_tokens // T, T)


def longest_sequence(config: Config) -> None:
    """Raises what says how long a sequence can be."""
    make_positions(config.model, 10**9)


def shapes(sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """A tree of abstract float32 arrays from their paths."""
    tree: dict[str, Any] = {}
    for path, shape in sizes.items():
        *folders, leaf = path.split("/")
        node = functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, tree)
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


# One or two parameters of every group, for the optimizer and for the export
PARAMETERS = {
    "embed/table": (16, 8),
    "bigram/table": (16, 4),
    "bigram/proj": (4, 8),
    "blocks/0/mlp/up": (8, 16),
    "blocks/0/attn/key": (8, 8),
    "blocks/0/attn_scale": (8,),
}


@functools.cache
def optimizer_program(optim: OptimConfig) -> str:
    params = shapes(PARAMETERS)
    optimizer = make_optimizer(optim, params)
    update = functools.partial(optimizer.update, lr_multiplier=0.5, adam_lr_multiplier=0.25)
    return as_text(jax.make_jaxpr(update)(params, jax.eval_shape(optimizer.init, params), params))


@functools.cache
def controls(optim: OptimConfig, train: TrainConfig) -> list[StepControls]:
    """Of every seventh step and all snapshots, on a machine that grows slower."""
    total, every = train.max_seconds or 1000.0, optim.swa_every or train.steps
    steps = sorted({*range(0, train.steps, 7), *range(every - 1, train.steps, every)})
    return [
        step_controls(optim, train, step, total * (step / train.steps) ** 1.1) for step in steps
    ]


@functools.cache
def step_program(optim: OptimConfig, train: TrainConfig) -> str:
    """A training step of a model as small as they come."""
    model = ModelConfig(
        vocab_size=8, num_layers=1, d_model=4, num_heads=1, num_kv_heads=1, mlp_dim=4, max_seq_len=4
    )
    data = DataConfig(batch_tokens=8, seq_len=4, slices=1)
    config = Config(model=model, optim=optim, train=train, data=data)
    shapes = Shapes.of(config, make_mesh(jax.devices()[:1]))
    batch = {name: jax.ShapeDtypeStruct((1, 2, 4), jnp.int32) for name in ("inputs", "targets")}
    flags = StepControls(np.float32(1), np.float32(1), np.bool_(True), np.bool_(True))
    return as_text(make_train_step(shapes).trace(shapes.state, batch, flags).jaxpr)


@functools.cache
def stream() -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, 2**16, 2**21).astype(np.uint16)
    return TokenStream((Shard(Path("0.bin"), tokens, NO_CORRECTIONS),), 2**16)


def batch(config: Config) -> dict[str, str]:
    return {name: digest(array) for name, array in batches_of(config, stream())[3].items()}


class LoopAlone(loop.Run):
    """A run that notes when it validates and saves, and has nothing else to do."""

    def __post_init__(self) -> None:
        self.events: list[tuple[int, bool, bool]] = []
        self.eval_step = self.token_bytes = None

    def agree_on_time(self) -> float:
        return 0.125 * self.done

    def step(self, seconds: float) -> None:
        self.done += 1

    def stoppable(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: None

    def aside(self, validating: bool, saving: bool) -> None:
        self.events.append((self.done, validating, saving))


def loop_of(config: Config) -> LoopAlone:
    """Its first 2,500 steps at most."""
    given = {
        field.name: SimpleNamespace(start=lambda step: None, flush=lambda: None)
        for field in dataclasses.fields(loop.Run)
    }
    given |= {"config": changed(config, train={"steps": min(config.train.steps, 2500)})}
    given |= {"data": SimpleNamespace(val=range(10**8)), "mesh": make_mesh()}
    run = LoopAlone(**given | {"position": loop.Position(), "done": 0, "sent": None})
    run.state = SimpleNamespace(variables=lambda: None)
    return run


def scored(config: Config) -> dict[str, Any]:
    """What the loop asks a validation for."""
    asked: dict[str, Any] = {}

    def score(scoring: loop.Pass) -> None:
        asked.update(windows=scoring.windows, tokens=scoring.device_batch_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Pass, "score", score)
        loop_of(config).score({})
    return asked


def measured(config: Config) -> str:
    """What the health of the codes is measured on."""

    class Asked(Exception):
        pass

    def read_windows(stream: Any, *arguments: Any) -> None:
        raise Asked(str(arguments[:2]))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked) as asked:
        patch.setattr(health, "read_windows", read_windows)
        health.score_health(config, {}, None, range(10**8), make_mesh(), step=1)
    return str(asked.value)


def events(config: Config) -> list[tuple[int, bool, bool]]:
    run = loop_of(config)
    run.loop()
    return run.events


@functools.cache
def exported(export: ExportConfig) -> dict[str, str]:
    """What becomes of weights of small and large rows."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in PARAMETERS.items():
        # one of fewer than passthrough_size weights
        columns = 48 if name == "bigram/proj" else 1200
        rows = np.exp(3 * rng.normal(size=(64, 1)))
        values = rows[:, 0] if len(shape) == 1 else rows * rng.standard_t(3, size=(64, columns))
        tensors[name] = values.astype(np.float32)
    stored = quantize_tensors(tensors, dataclasses.replace(DEFAULTS, export=export))
    return {
        name: repr(jax.tree.map(digest, vars(x) if isinstance(x, Quantized) else x))
        for name, x in stored.items()
    }


@functools.cache
def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    params, _ = abstract_parts(dataclasses.replace(model, levels=()))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): leaf.shape for path, leaf in leaves}


# Of each section, the cheapest first: those after the first that sees a difference are not asked
OBSERVERS: dict[str, list[Callable[[Config], object]]] = {
    "model": [
        functools.partial(shallow_program, coded=False),
        functools.partial(shallow_program, coded=True),
        longest_sequence,
    ],
    "optim": [
        lambda config: groups(config.optim),
        lambda config: controls(config.optim, config.train),
        lambda config: optimizer_program(config.optim),
        lambda config: step_program(config.optim, TrainConfig()),
    ],
    "data": [spec_of, batch],
    "train": [
        lambda config: controls(config.optim, config.train),
        lambda config: [
            microbatches(
                config.data.batch_tokens, config.train.device_batch_tokens, config.data.seq_len, n
            )
            for n in (1, 8)
        ],
        lambda config: make_mesh(fsdp=config.train.fsdp).shape,
        events,
    ],
    "eval": [scored, events, measured],
    "export": [
        lambda config: storage_of(config.export),
        lambda config: [
            policy_of(path, shape, config) for path, shape in parameter_shapes(config.model).items()
        ],
        lambda config: exported(config.export),
    ],
}


def outcome(observe: Callable[[Config], object], config: Config) -> object:
    """What is observed, or how the configuration is refused."""
    try:
        return observe(config)
    except (ValueError, UserError) as error:
        return str(error)


def differ(section: str, config: Config, other: Config) -> bool:
    """Whether what a section decides is different."""
    return any(
        outcome(observe, config) != outcome(observe, other) for observe in OBSERVERS[section]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_sets_changes_something(recipe):
    config, defaults = load(recipe), flat(DEFAULTS)
    dead = []
    for field, value in flat(config).items():
        if value != defaults[field] and field not in SEEN_ELSEWHERE:
            section, name = field.split(".")
            if not differ(section, config, changed(config, **{section: {name: defaults[field]}})):
                dead.append(field)
    assert dead == []


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"bos_id": 7}),  # without smear_mask_bos
        ("optim", {"swa_below": 0.25}),  # without snapshots
        ("data", {"val_docs": 40}),  # as it is
        ("train", {"keep_checkpoints": 7}),  # nothing here looks at it
        ("eval", {"sample_tokens": 7}),  # nor at that
        ("export", {"clip_percentile": 99.0}),  # with another clip
    ],
)
def test_a_field_that_does_nothing_is_seen_to(section, values):
    config = load("quickstart")
    assert not differ(section, config, changed(config, **{section: values}))
