"""The configuration of a run: frozen dataclasses, and what cannot be combined.

The comment beside a field is its `--help` text. `recipe.py` reads configurations from files and the command line.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from sngpt_jax.cli import UserError

Weights = Literal["final", "swa", "ema"]  # those after the last step, the mean of snapshots, the exponential moving average


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
    mlp_dim: int = 1024  # F, hidden width of the MLP; any, such as int(2.75 * d_model)
    mlp_activation: Literal["relu2", "leaky_relu2"] = "relu2"  # relu(h)^2, or leaky_relu(h, slope 0.5)^2
    max_seq_len: int = 1024  # longest sequence the model takes
    rope_dims: int = 0  # leading dimensions of a head that rotary positions turn; 0: all of them
    rope_base: float = 10_000.0  # rotary base; larger turns slower
    rope_ntk_len: int = 0  # sequences longer than this raise the rotary base to match (NTK scaling); 0: never
    q_gain_init: float = 1.5  # initial per-head gain on the normalized queries
    xsa_layers: int = 0  # last so many layers remove each position's own value direction from its attention output (XSA)
    attention_gate: bool = False  # each head's output times a sigmoid of the layer's input
    value_residual: bool = False  # layers after the first mix the first layer's values into theirs
    value_embed_layers: tuple[int, ...] = ()  # layers, counted from 0, that add an embedding of the token to its values
    value_embed_dim: int = 128  # width of that embedding's table, shared by the layers
    recycle_layers: tuple[int, ...] = ()  # layers of the first half applied once more between the halves, in this order
    ln_scale: bool = False  # normalized inputs of layer i times 1 / sqrt(i + 1)
    smear: Literal["none", "after_norm", "before_norm"] = "none"  # blend of each embedding with the previous position's
    smear_mask_bos: bool = False  # the start of a document takes nothing from the document before it
    bos_id: int = 1  # token that starts a document, for smear_mask_bos
    bigram_buckets: int = 0  # rows of the table that embeds hashed pairs of tokens; 0: none
    bigram_dim: int = 128  # width of that table
    bigram_hash: Literal["xor", "sum"] = "xor"  # of the two multiplied ids; xor keeps a bucket for a sequence's start
    bigram_init_std: float = 0.0  # standard deviation of that table at the start
    bigram_proj_gain: float = 1.0  # singular values of its projection at the start, with matrix_init = orthogonal
    bigram_scale_init: float = 0.05  # learned factor on its output, at the start; 0: no such factor
    matrix_init: Literal["fan_in_uniform", "orthogonal"] = "fan_in_uniform"  # of matrices that do not start at zero
    embed_init_std: float = 0.005  # standard deviation of the token embedding at the start
    embed_init: Literal["normal", "overtone"] = "normal"  # overtone: singular values then fall as 1 / sqrt(rank)
    resid_mix_init: Literal["identity", "phase"] = "identity"  # phase: early layers start from the embedding, late ones not
    logit_soft_cap: float = 30.0  # logits become cap * tanh(logits / cap)
    norm_eps: float = 1.1920929e-7  # added to the mean square in every RMSNorm
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on an accelerator, float32 on a CPU
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # auto: cudnn on an NVIDIA GPU in bfloat16, else xla

    @property
    def head_dim(self) -> int:
        """h, the size of one attention head."""
        return self.d_model // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """r, the leading dimensions of a head that rotary positions turn."""
        return self.rope_dims or self.head_dim

    @property
    def num_skips(self) -> int:
        """Layers of the first half, each of which saves a skip for the second half."""
        return self.num_layers // 2


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the blocks' matrices, Adam for the rest, and the schedule that drives both."""

    muon_lr: float = 0.04  # peak learning rate of the blocks' matrices
    embed_lr: float = 0.05  # peak learning rate of the token embedding (Adam)
    table_lr: float = 0.05  # peak learning rate of the bigram and value tables (Adam)
    scalar_lr: float = 0.04  # peak learning rate of gains, scales and mixing weights (Adam)
    projection_rule: Literal["muon", "adam"] = "muon"  # of the matrices behind those tables: as blocks' matrices, or scalars
    muon_weight_decay: float = 0.0  # decoupled, times the scheduled learning rate
    adam_weight_decay: float = 0.0  # decoupled, times the scheduled learning rate
    muon_momentum: float = 0.95  # Nesterov momentum after its warmup
    muon_momentum_start: float = 0.85  # momentum at step 0, raised linearly
    muon_momentum_warmup_steps: int = 500  # steps that the raise takes; 0: none
    muon_momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # in which Muon's momentum is kept
    newton_schulz_steps: int = 5  # iterations of the orthogonalization
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the orthogonalization's products
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.0  # largest global L2 norm of the gradient; 0: no clipping
    grad_clip_scope: Literal["global", "device"] = "global"  # device: each device's own gradient, before they are averaged
    schedule: Literal["constant", "linear_warmdown"] = "linear_warmdown"  # the shape of the rate after its warmup
    warmup_steps: int = 0  # linear rise of the learning rates from 0
    warmdown_steps: int = 0  # linear fall to final_lr_fraction over the last so many steps; or give warmdown_fraction
    warmdown_fraction: float = 0.0  # the same as a share of the run, 0 to 1
    warmdown_clock: Literal["steps", "wall_clock"] = "steps"  # wall_clock: the fall ends at train.max_seconds
    final_lr_fraction: float = 0.0  # of the peak rates, at the end of the warmdown
    ema_decay: float = 0.0  # of the exponential moving average of the weights, a step; 0: none is kept
    swa_every: int = 0  # steps between snapshots of the mean of the weights (SWA); 0: none is kept
    swa_below: float = 0.5  # snapshots are taken once the warmdown has brought the learning rates below this fraction
    average_table_dtype: Literal["float32", "bfloat16"] = "float32"  # in which averages of embedding tables are kept
    qat_below: float = 0.0  # weights are put on the exported grid once the warmdown has gone below this fraction; 0: never


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
    weights: Weights = "final"  # which ones the other commands take: the last step's, or an average
    sample_prompt: str = ""  # prompt of the sample that a finished training run prints
    sample_tokens: int = 0  # length of that sample; 0: none


@dataclass(frozen=True)
class ExportConfig:
    """The grid of the exported matrices, one scale for each output channel; late quantization-aware training imitates it."""

    mlp_bits: int = 8  # of the MLPs' matrices, 2 to 8; 16: half precision, no grid
    attention_bits: int = 8  # of the attention's matrices
    projection_bits: int = 16  # of the matrices behind the bigram and value tables
    scale_floor: float = 1e-12  # least distance between two neighbours on the grid


@dataclass(frozen=True)
class Config:
    """One recipe, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


# ---------------------------------------------------------------------------------------------- what cannot be


def _problems(config: Config) -> Iterator[str]:
    m, o, d, t, e, x = config.model, config.optim, config.data, config.train, config.eval, config.export
    at_least_one = {
        "model": (
            "vocab_size",
            "num_layers",
            "d_model",
            "num_heads",
            "num_kv_heads",
            "mlp_dim",
            "max_seq_len",
            "value_embed_dim",
            "bigram_dim",
        ),
        "optim": ("newton_schulz_steps",),
        "data": ("batch_tokens", "seq_len", "slices", "val_docs"),
        "train": ("steps", "device_batch_tokens", "log_every", "keep_checkpoints"),
        "eval": ("device_batch_tokens",),
    }
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if isinstance(value, tuple):
                value = min(value, default=0)
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
    yield from _model_problems(m)
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
    else:
        if o.warmdown_steps or o.warmdown_fraction:
            yield "optim.schedule = constant takes no optim.warmdown_steps or optim.warmdown_fraction; set them to 0"
        if o.swa_every or o.qat_below:
            yield "optim.swa_every and optim.qat_below follow the warmdown, which optim.schedule = constant has not"
    for name in ("warmdown_fraction", "final_lr_fraction", "swa_below", "qat_below"):
        if getattr(o, name) > 1:
            yield f"optim.{name} = {getattr(o, name)} is more than 1"
    for name in ("muon_momentum", "muon_momentum_start", "adam_b1", "adam_b2", "ema_decay"):
        if getattr(o, name) >= 1:
            yield f"optim.{name} = {getattr(o, name)} must be less than 1"
    if o.warmdown_clock == "wall_clock" and not t.max_seconds:
        yield "optim.warmdown_clock = wall_clock needs train.max_seconds"
    if o.schedule == "linear_warmdown" and o.warmdown_clock == "steps" and o.warmup_steps + o.warmdown_steps > t.steps:
        yield (
            f"optim.warmup_steps + optim.warmdown_steps = {o.warmup_steps + o.warmdown_steps} exceeds train.steps = {t.steps}"
        )
    if o.swa_every > t.steps:
        yield f"optim.swa_every = {o.swa_every} exceeds train.steps = {t.steps}: no snapshot would ever be taken"
    if o.grad_clip_scope == "device" and not o.grad_clip:
        yield "optim.grad_clip_scope = device clips nothing with optim.grad_clip = 0"
    if x.scale_floor > 1:
        yield f"export.scale_floor = {x.scale_floor} is more than 1, wider than any weights"
    if o.swa_every and o.swa_below <= o.final_lr_fraction:
        yield f"optim.swa_below = {o.swa_below} is never reached with optim.final_lr_fraction = {o.final_lr_fraction}"
    if o.qat_below and o.qat_below <= o.final_lr_fraction:
        yield f"optim.qat_below = {o.qat_below} is never reached with optim.final_lr_fraction = {o.final_lr_fraction}"
    bits = {name: getattr(x, name) for name in ("mlp_bits", "attention_bits", "projection_bits")}
    for name, value in bits.items():
        if not (2 <= value <= 8 or value == 16):
            yield f"export.{name} = {value} is neither 2 to 8 nor 16"
    if o.qat_below and set(bits.values()) == {16}:
        yield "optim.qat_below has no grid to train for: export.mlp_bits, attention_bits and projection_bits are all 16"
    if e.weights == "swa" and not o.swa_every:
        yield "eval.weights = swa needs optim.swa_every"
    if e.weights == "ema" and not o.ema_decay:
        yield "eval.weights = ema needs optim.ema_decay"
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


def _model_problems(m: ModelConfig) -> Iterator[str]:
    if m.rope_dims % 2 or m.rope_dims > m.head_dim:
        yield f"model.rope_dims = {m.rope_dims} is not an even number up to the head size, {m.head_dim}"
    if m.rope_ntk_len and m.rotary_dims <= 2:
        yield f"model.rope_ntk_len has nothing to scale with {m.rotary_dims} rotary dimensions; it needs 4 or more"
    if m.rope_ntk_len >= m.max_seq_len:
        yield f"model.rope_ntk_len = {m.rope_ntk_len} is never exceeded with model.max_seq_len = {m.max_seq_len}"
    if m.xsa_layers > m.num_layers:
        yield f"model.xsa_layers = {m.xsa_layers} exceeds model.num_layers = {m.num_layers}"
    if len(set(m.value_embed_layers)) < len(m.value_embed_layers) or max(m.value_embed_layers, default=0) >= m.num_layers:
        yield f"model.value_embed_layers = {m.value_embed_layers} are not distinct layers from 0 to {m.num_layers - 1}"
    if m.recycle_layers and max(m.recycle_layers) >= m.num_skips:
        yield f"model.recycle_layers = {m.recycle_layers} are not all of the first half, layers 0 to {m.num_skips - 1}"
    if m.smear_mask_bos and m.smear == "none":
        yield "model.smear_mask_bos masks nothing with model.smear = none"
    if m.smear_mask_bos and m.bos_id >= m.vocab_size:
        yield f"model.bos_id = {m.bos_id} is not below model.vocab_size = {m.vocab_size}"
    if m.bigram_buckets == 1 or m.bigram_buckets > 2**16:
        yield f"model.bigram_buckets = {m.bigram_buckets} is neither 0 nor 2 to 65536"


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


def to_json(config: Config) -> str:
    """The text of `config.json`: every field, so that a later change of a default does not change a replay."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """One line a field in which two configurations differ: `section.field: old -> new`."""
    return [
        f"{section.name}.{f.name}: {a!r} -> {b!r}"
        for section in dataclasses.fields(old)
        for f in dataclasses.fields(getattr(old, section.name))
        if (a := getattr(getattr(old, section.name), f.name)) != (b := getattr(getattr(new, section.name), f.name))
    ]
