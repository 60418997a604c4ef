"""The configuration of a run: frozen dataclasses, how a recipe is loaded and overridden, and what cannot be combined.

A recipe is a Python file that binds one `Config` to the name `config`. A run directory's `config.json` is the same thing as
data and replays the run exactly. The comment beside a field is its `--help` text. Nothing here imports jax.
"""

import argparse
import dataclasses
import difflib
import json
import math
import runpy
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from sngpt_jax import typed_json
from sngpt_jax.cli import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot be read or cannot run; names the fields and what would do."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: a GPT with tied embeddings, U-Net skips and residual mixing (the compact GPT family)."""

    vocab_size: int = 1024  # V, tokens in the vocabulary; the tokenizer must agree
    num_layers: int = 9  # L, transformer blocks; the first half saves skips that the second half takes back
    d_model: int = 512  # D, width of the residual stream
    num_heads: int = 8  # H, query heads
    num_kv_heads: int = 4  # K, key/value heads; each serves num_heads / num_kv_heads query heads
    mlp_dim: int = 1024  # F, hidden width of the MLP
    max_seq_len: int = 1024  # positions that the rotary tables cover: the longest sequence the model takes
    rope_base: float = 10_000.0  # rotary base; larger turns slower
    q_gain_init: float = 1.5  # initial per-head gain on the normalized queries
    logit_soft_cap: float = 30.0  # logits become cap * tanh(logits / cap)
    embed_init_std: float = 0.005  # standard deviation of the token embedding at the start
    norm_eps: float = 1.1920929e-7  # added to the mean square in every RMSNorm
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on an accelerator, float32 on a CPU
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # auto: cudnn on an NVIDIA GPU in bfloat16, else xla

    @property
    def head_dim(self) -> int:
        """h, the size of one attention head."""
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the blocks' matrices, Adam for the rest, and the schedule that drives both."""

    muon_lr: float = 0.04  # peak learning rate of the blocks' matrices
    embed_lr: float = 0.05  # peak learning rate of the token embedding (Adam)
    scalar_lr: float = 0.04  # peak learning rate of gains, scales and mixing weights (Adam)
    muon_weight_decay: float = 0.0  # decoupled, times the scheduled learning rate
    adam_weight_decay: float = 0.0  # decoupled, times the scheduled learning rate
    muon_momentum: float = 0.95  # Nesterov momentum after its warmup
    muon_momentum_start: float = 0.85  # momentum at step 0, raised linearly
    muon_momentum_warmup_steps: int = 500  # steps that the raise takes; 0: none
    newton_schulz_steps: int = 5  # iterations of the orthogonalization
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the orthogonalization's products
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.0  # largest global L2 norm of the gradient; 0: no clipping
    schedule: Literal["constant", "linear_warmdown"] = "linear_warmdown"  # the shape of the rate after its warmup
    warmup_steps: int = 0  # linear rise of the learning rates from 0
    warmdown_steps: int = 0  # linear fall to final_lr_fraction over the last so many steps; or give warmdown_fraction
    warmdown_fraction: float = 0.0  # the same as a share of the run, 0 to 1
    warmdown_clock: Literal["steps", "wall_clock"] = "steps"  # wall_clock: the fall ends at train.max_seconds
    final_lr_fraction: float = 0.0  # of the peak rates, at the end of the warmdown


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how a step takes them."""

    dir: str = "data/fineweb_sp1024"  # folder with shards and tokenizer, made by `sngpt_jax.data.prepare`
    source: str = ""  # what to prepare when dir is empty: stdlib, a file or folder of text, golf:…, or hub:DATASET
    val_source: str = ""  # validation text of its own; empty: the source's first val_docs documents
    val_docs: int = 50_000  # documents held out for validation when there is no val_source
    tokenizer: str = "train"  # a SentencePiece .model, a tokenizer.json, or train: learn one on the source
    normalization: Literal["nmt_nfkc", "identity"] = "nmt_nfkc"  # of a learnt tokenizer; identity keeps all whitespace
    batch_tokens: int = 524_288  # tokens of one optimizer step, over all devices
    seq_len: int = 1024  # T, tokens of one training sequence
    slices: int = 8  # runs of consecutive tokens in a batch; data order depends on it, never on the devices
    shuffle: bool = False  # take the stream's slices in a random order, new each epoch, instead of one after the other


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, and what it leaves behind."""

    steps: int = 20_000  # optimizer steps
    max_seconds: float = 0.0  # wall-clock training time that ends the run, compilation and validation left out; 0: no cap
    device_batch_tokens: int = 65_536  # most tokens in one device's microbatch; the rest is gradient accumulation
    seed: int = 1337  # of the initial weights and of data.shuffle
    log_every: int = 1  # steps between lines of metrics
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # newest ones kept, beside the one with the best validation loss
    profile_steps: str = ""  # FIRST:LAST steps, counted from 1, to trace into the run's profile/ folder, for xprof
    compilation_cache: str = "~/.cache/sngpt_jax/xla"  # folder of compiled programs shared by runs; empty: none


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training, and the sample at its end."""

    every: int = 1000  # steps between validations while training; 0: only at the end
    tokens: int = 0  # validation tokens scored while training, from the start of the stream; 0: all
    device_batch_tokens: int = 65_536  # most tokens one device scores at a time, also in `evaluate`
    sample_prompt: str = ""  # prompt of the sample that a finished training run prints
    sample_tokens: int = 0  # length of that sample; 0: none


@dataclass(frozen=True)
class Config:
    """One recipe, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# ---------------------------------------------------------------------------------------------- what cannot be


def _problems(config: Config) -> Iterator[str]:
    m, o, d, t, e = config.model, config.optim, config.data, config.train, config.eval
    at_least_one = {
        "model": ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "mlp_dim", "max_seq_len"),
        "optim": ("newton_schulz_steps",),
        "data": ("batch_tokens", "seq_len", "slices", "val_docs"),
        "train": ("steps", "device_batch_tokens", "log_every", "keep_checkpoints"),
        "eval": ("device_batch_tokens",),
    }
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{section.name}.{f.name} = {value} is not a finite number"
            elif isinstance(value, int | float) and value < 0:
                yield f"{section.name}.{f.name} = {value} is negative"
            elif f.name in at_least_one.get(section.name, ()) and value < 1:
                yield f"{section.name}.{f.name} = {value} must be at least 1"
    if any(getattr(m, name) < 1 for name in at_least_one["model"]) or min(d.batch_tokens, d.seq_len, d.slices) < 1:
        return  # the divisions below need them positive

    if m.d_model % m.num_heads:
        yield f"model.d_model = {m.d_model} is not divisible by model.num_heads = {m.num_heads}"
    elif m.head_dim % 2:
        yield f"model.d_model / model.num_heads = {m.head_dim} is odd; rotary position embedding needs an even head size"
    if m.num_heads % m.num_kv_heads:
        yield f"model.num_heads = {m.num_heads} is not divisible by model.num_kv_heads = {m.num_kv_heads}"
    for name in ("logit_soft_cap", "rope_base"):
        if getattr(m, name) <= 0:
            yield f"model.{name} = {getattr(m, name)} must be greater than 0"
    if m.attention == "cudnn" and m.compute_dtype == "float32":
        yield "model.attention = cudnn does not serve model.compute_dtype = float32; use bfloat16 or attention xla"

    if d.seq_len > m.max_seq_len:
        yield f"data.seq_len = {d.seq_len} exceeds model.max_seq_len = {m.max_seq_len}"
    if d.batch_tokens % (d.slices * d.seq_len):
        yield (
            f"data.batch_tokens = {d.batch_tokens} is not divisible by data.slices x data.seq_len"
            f" = {d.slices} x {d.seq_len} = {d.slices * d.seq_len}"
        )
    for section_name, tokens in (("train", t.device_batch_tokens), ("eval", e.device_batch_tokens)):
        if 1 <= tokens < d.seq_len:
            yield f"{section_name}.device_batch_tokens = {tokens} is less than one sequence, data.seq_len = {d.seq_len}"

    if o.schedule == "linear_warmdown":
        if bool(o.warmdown_steps) == bool(o.warmdown_fraction):
            yield "optim.schedule = linear_warmdown needs exactly one of optim.warmdown_steps and optim.warmdown_fraction"
    elif o.warmdown_steps or o.warmdown_fraction:
        yield "optim.schedule = constant takes no optim.warmdown_steps or optim.warmdown_fraction; set them to 0"
    for name in ("warmdown_fraction", "final_lr_fraction"):
        if getattr(o, name) > 1:
            yield f"optim.{name} = {getattr(o, name)} is more than 1"
    for name in ("muon_momentum", "muon_momentum_start", "adam_b1", "adam_b2"):
        if getattr(o, name) >= 1:
            yield f"optim.{name} = {getattr(o, name)} must be less than 1"
    if o.warmdown_clock == "wall_clock" and not t.max_seconds:
        yield "optim.warmdown_clock = wall_clock needs train.max_seconds"
    if o.schedule == "linear_warmdown" and o.warmdown_clock == "steps" and o.warmup_steps + o.warmdown_steps > t.steps:
        yield (
            f"optim.warmup_steps + optim.warmdown_steps = {o.warmup_steps + o.warmdown_steps} exceeds train.steps = {t.steps}"
        )
    try:
        profile_window(t)
    except ConfigError as error:
        yield str(error)
    if e.tokens and e.tokens < d.seq_len:
        yield f"eval.tokens = {e.tokens} is less than one sequence, data.seq_len = {d.seq_len}"
    if e.sample_tokens >= m.max_seq_len:
        yield f"eval.sample_tokens = {e.sample_tokens} leaves no room for a prompt in model.max_seq_len = {m.max_seq_len}"
    if m.vocab_size > 2**16:
        yield f"model.vocab_size = {m.vocab_size} exceeds 65536; tokens are stored as uint16"


def profile_window(train: TrainConfig) -> tuple[int, int] | None:
    """First and last step to trace, from `train.profile_steps` ("5:8"), or None where it is empty."""
    if not train.profile_steps:
        return None
    first, colon, last = train.profile_steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= train.steps):
        raise ConfigError(
            f"train.profile_steps = {train.profile_steps!r} is not FIRST:LAST"
            f" with 1 <= FIRST <= LAST <= train.steps = {train.steps}"
        )
    return int(first), int(last)


def validate(config: Config) -> Config:
    """Returns `config`; raises `ConfigError` naming every field of every impossible combination."""
    problems = list(_problems(config))
    if problems:
        raise ConfigError("configuration: " + "; ".join(problems))
    return config


def microbatches(tokens: int, device_tokens: int, seq_len: int, num_devices: int) -> int:
    """The fewest equal microbatches of a step of `tokens` that keep each device within `device_tokens` whole sequences' tokens.

    Raises `ConfigError` where the sequences of a step cannot be dealt out evenly to the devices.
    """
    sequences = tokens // seq_len
    if sequences % num_devices:
        raise ConfigError(
            f"data.batch_tokens = {tokens} is {sequences} sequences of data.seq_len = {seq_len},"
            f" which do not divide over {num_devices} devices"
        )
    per_device = sequences // num_devices
    return next(n for n in range(1, per_device + 1) if per_device % n == 0 and per_device // n * seq_len <= device_tokens)


# ---------------------------------------------------------------------------------------------- reading and writing


def to_json(config: Config) -> str:
    """The text of `config.json`: every field, so that a later change of a default does not change a replay."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def read_json(path: Path) -> Config:
    """The configuration that a `config.json` holds. Raises `ConfigError`."""
    return validate(typed_json.parse(Config, typed_json.read(path, ConfigError), str(path), ConfigError))


def _recipe_path(name: str) -> Path:
    here = Path(__file__).resolve().parent
    folders = [Path("configs"), here.parent / "configs", here / "configs"]  # the last is where a wheel carries them
    if Path(name).is_file():
        return Path(name)
    if "/" not in name and not name.endswith((".py", ".json")):
        for folder in folders:
            if (folder / f"{name}.py").is_file():
                return folder / f"{name}.py"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"recipes: {', '.join(known)}"
    raise ConfigError(f"--config {name}: no such file or recipe; {hint}")


def load(name: str) -> Config:
    """The configuration that a recipe file, a bare recipe name, or a `config.json` holds. Recipes are code and are run."""
    path = _recipe_path(name)
    if path.suffix == ".json":
        return read_json(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: the recipe does not run: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path}: a recipe binds a sngpt_jax.config.Config to the name `config`; found {type(config).__name__}"
        )
    # Python checks no types: a recipe is held to the same rules as a config.json
    return validate(typed_json.parse(Config, dataclasses.asdict(config), str(path), ConfigError))


def recipe_name(name: str) -> str:
    """The name under which runs of `--config name` are kept: the recipe's, or NAME-replay for the config.json of a run NAME."""
    path = Path(name)
    return f"{path.resolve().parent.name}-replay" if path.suffix == ".json" else path.stem


def differences(old: Config, new: Config) -> list[str]:
    """One line a field in which two configurations differ: `section.field: old -> new`."""
    return [
        f"{section.name}.{f.name}: {a!r} -> {b!r}"
        for section in dataclasses.fields(old)
        for f in dataclasses.fields(getattr(old, section.name))
        if (a := getattr(getattr(old, section.name), f.name)) != (b := getattr(getattr(new, section.name), f.name))
    ]


# ---------------------------------------------------------------------------------------------- the command line

Overrides = Annotated[Config, tyro.conf.arg(name="")]  # a command's field of this type becomes `--section.field value` options


def parse_command(kind: type[T], argv: Sequence[str], *, program: str, description: str) -> T:
    """Parses `argv` into the dataclass `kind`, whose fields include `config: str` and `overrides: Overrides`.

    `--config` is loaded first, so that `--help` shows the recipe's own values as defaults. tyro prints its usage box for
    an unknown or mistyped option and exits with status 2. The result's `overrides` is the validated configuration.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="")
    known, _ = first.parse_known_args(argv)
    base = load(known.config) if known.config else Config()
    settings = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
    default: Any = typing.cast(Any, kind)(config=known.config or tyro.MISSING, overrides=base)
    arguments: Any = tyro.cli(kind, args=list(argv), prog=program, description=description, config=settings, default=default)
    validate(arguments.overrides)
    return arguments
