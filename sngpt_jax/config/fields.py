"""The configuration of a run: frozen dataclasses.

The comment beside or above a field is its `--help` text.
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

from sngpt_jax.base.errors import UserError

ByteCount = Literal["text", "golf"]
FORMAT = 1  # of config.json; `config.file` says when it is raised

Weights = Literal["final", "swa", "ema"]  # last step, mean of snapshots, moving average
Clip = Literal["row_max", "percentile", "search", "sd"]  # how a row's range is chosen

PATH = "path"  # marks a text that may name a file or a folder
PathText = Annotated[str, PATH]


class ConfigError(UserError):
    """A configuration that cannot be read or cannot run. The message names the fields."""


class Level(NamedTuple):
    """One level of a sparse code."""

    n: int  # this level and the levels before it own 2^n features
    k: int  # active features per token
    degree: int  # budget of children per parent; 0 for the first level


@dataclass(frozen=True)
class ModelConfig:
    """The network: a GPT with tied embeddings. Fields that only one family reads name it."""

    # compact: with U-Net skips and residual mixing; pre_norm: plain, with gains
    family: Literal["compact", "pre_norm"] = "compact"
    vocab_size: int = 1024  # V, rows of the token table, at least one per token
    num_layers: int = 9  # L, transformer blocks; a compact model's first half saves skips
    d_model: int = 512  # D, width of the residual stream
    num_heads: int = 8  # H, query heads
    num_kv_heads: int = 4  # K, key/value heads; each serves H / K query heads
    mlp_dim: int = 1024  # F, hidden width of the MLP
    # relu(h)^2, leaky_relu(h, slope 0.5)^2, or exact GELU
    mlp_activation: Literal["relu2", "leaky_relu2", "gelu"] = "relu2"
    # sparse code before each MLP, as "n,k,degree;n,k,degree;..."; empty: no code (pre_norm)
    levels: tuple[Level, ...] = ()
    generators: Literal["spread", "prefix"] = "spread"  # children: over all ids, or a prefix tree
    # the code carries standardized scores; False: they only select, raw scores are carried
    forward_standardized: bool = True
    max_seq_len: int = 1024  # longest sequence that the model takes
    # rotary: positions rotate queries and keys; learned: a table is added (pre_norm)
    positions: Literal["rotary", "learned"] = "rotary"
    qk_norm: bool = True  # normalize queries and keys, with a gain per query head
    rope_dims: int = 0  # leading dimensions of a head that rotary positions rotate; 0: all
    rope_base: float = 10_000.0  # rotary base; a larger base rotates slower
    rope_ntk_len: int = 0  # raise the rotary base for longer sequences (NTK scaling); 0: never
    q_gain_init: float = 1.5  # initial gain per head on the normalized queries
    xsa_layers: int = 0  # last layers that remove a position's own value from its output (XSA)
    attention_gate: bool = False  # each head's output times a sigmoid of the layer's input
    value_residual: bool = False  # mix the first layer's values into all others' (compact)
    # layers, counted from 0, that add an embedding of the token to their values (compact)
    value_embed_layers: tuple[int, ...] = ()
    value_embed_dim: int = 128  # width of the table of value embeddings
    # layers of the first half that run once more between the halves, in this order (compact)
    recycle_layers: tuple[int, ...] = ()
    ln_scale: bool = False  # normalized inputs of layer i times 1 / sqrt(i + 1) (compact)
    # blend each embedding with the previous position's, before or after the norm (compact)
    smear: Literal["none", "after_norm", "before_norm"] = "none"
    smear_mask_bos: bool = False  # smear does not blend across the start of a document
    bos_id: int = 1  # id of the token that starts a document, read by smear_mask_bos
    bigram_buckets: int = 0  # rows of the table of hashed token pairs; 0: no table (compact)
    bigram_dim: int = 128  # width of the bigram table
    # hash of a pair: of its multiplied ids; xor reserves a row for a sequence's start
    bigram_hash: Literal["xor", "sum"] = "xor"
    bigram_init_std: float = 0.0  # initial standard deviation of the bigram table
    # initial singular values of the bigram projection, with matrix_init = orthogonal
    bigram_proj_gain: float = 1.0
    bigram_scale_init: float = 0.05  # initial learned factor on the bigram vectors; 0: no factor
    # initial matrices; except with normal, those that write to the stream start at 0
    matrix_init: Literal["fan_in_uniform", "orthogonal", "normal"] = "fan_in_uniform"
    # standard deviation with normal, divided by sqrt(2 L) if a matrix writes to the stream
    matrix_init_std: float = 0.02
    embed_init_std: float = 0.005  # initial standard deviation of token and position tables
    # overtone: the singular values of the token embedding then fall as 1 / sqrt(rank)
    embed_init: Literal["normal", "overtone"] = "normal"
    # phase: early layers start from the embedding, late layers from the stream (compact)
    resid_mix_init: Literal["identity", "phase"] = "identity"
    logit_soft_cap: float = 30.0  # logits become cap * tanh(logits / cap); 0: no cap
    logit_chunk: int = 0  # tokens whose logits the loss holds at a time; 0: all tokens
    norm_eps: float = 1.1920929e-7  # added to the mean square in every RMSNorm
    # dtype of activations; auto: bfloat16 on an accelerator, float32 on a CPU
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # implementation of attention; auto: the fastest known on this device; tokamax and fa4_jax need
    # the extra `attention`; with xla no kernel makes the exclusion and the gate either
    attention: Literal["auto", "xla", "cudnn", "pallas_triton", "tokamax", "fa4_jax"] = "auto"
    # implementation of queries' and keys' norm and rotation; auto: pallas_triton on an NVIDIA GPU
    rotary: Literal["auto", "xla", "pallas_triton"] = "auto"
    # implementation of the residual stream's sums and norms; auto: pallas_triton on an NVIDIA GPU
    stream: Literal["auto", "xla", "pallas_triton"] = "auto"
    # implementation of compact blocks' attention output and MLP; auto: xla, unless a measurement on
    # this device says pallas_triton, whose matrix products contain the passes beside them
    mlp: Literal["auto", "xla", "pallas_triton"] = "auto"
    # implementation of the sparse codes; auto: pallas_triton on an NVIDIA GPU
    code: Literal["auto", "xla", "pallas_triton"] = "auto"

    @property
    def head_dim(self) -> int:
        """h, the size of one attention head."""
        return self.d_model // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """r, the leading dimensions of a head that rotary positions rotate."""
        return self.rope_dims or self.head_dim

    @property
    def num_skips(self) -> int:
        """Layers of the first half; each of them saves a skip for the second half."""
        return self.num_layers // 2


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the blocks' matrices, Adam for all other parameters, and their schedule."""

    muon_lr: float = 0.04  # peak learning rate of the blocks' matrices
    embed_lr: float = 0.05  # peak learning rate of the token embedding (Adam)
    table_lr: float = 0.05  # peak learning rate of the bigram and value tables (Adam)
    scalar_lr: float = 0.04  # peak learning rate of gains, scales and mixing weights (Adam)
    # rule of the projections behind the bigram and value tables: that of matrices or scalars
    projection_rule: Literal["muon", "adam"] = "muon"
    muon_weight_decay: float = 0.0  # decoupled decay of Muon's matrices, times the learning rate
    adam_weight_decay: float = 0.0  # decoupled decay of Adam's parameters, times the learning rate
    muon_momentum: float = 0.95  # Nesterov momentum after its warmup
    muon_momentum_start: float = 0.85  # Nesterov momentum at step 0
    muon_momentum_warmup_steps: int = 500  # steps in which the momentum rises; 0: none
    muon_momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of Muon's momentum
    newton_schulz_steps: int = 5  # iterations of Muon's orthogonalization
    # dtype of the orthogonalization's products
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # quintic: one polynomial for all iterations; polar_express: the best one for each
    muon_coefficients: Literal["quintic", "polar_express"] = "quintic"
    normuon_beta2: float = 0.0  # decay of each neuron's mean squared update (NorMuon); 0: off
    adam_b1: float = 0.9  # decay of Adam's mean gradient
    adam_b2: float = 0.95  # decay of Adam's mean squared gradient
    adam_eps: float = 1e-8  # added to Adam's divisor
    grad_clip: float = 0.0  # largest global L2 norm of the gradient; 0: no clipping
    # global: clip the mean gradient; device: clip each device's gradient before the mean
    grad_clip_scope: Literal["global", "device"] = "global"
    # learning rates after the warmup
    schedule: Literal["constant", "linear_warmdown"] = "linear_warmdown"
    warmup_steps: int = 0  # steps in which the learning rates rise linearly from 0
    warmdown_steps: int = 0  # last steps in which the rates fall; or set warmdown_fraction
    warmdown_fraction: float = 0.0  # length of the warmdown as a share of the run, 0 to 1
    # wall_clock: the warmdown ends at train.max_seconds instead of train.steps
    warmdown_clock: Literal["steps", "wall_clock"] = "steps"
    final_lr_fraction: float = 0.0  # share of the peak rates at the end of the warmdown
    # share of Adam's peak rates at the end of the warmdown; None: final_lr_fraction
    adam_final_lr_fraction: float | None = None
    ema_decay: float = 0.0  # decay per step of the weights' moving average; 0: no average
    swa_every: int = 0  # steps between snapshots for the mean of the weights (SWA); 0: no mean
    swa_below: float = 0.5  # snapshots begin once the warmdown is below this fraction
    # dtype of the averages of embedding tables
    average_table_dtype: Literal["float32", "bfloat16"] = "float32"
    # train on the exported grid once the warmdown is below this fraction (QAT); 0: never
    qat_below: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from, and how a step takes them."""

    dir: PathText = "data/fineweb_sp1024"  # folder with shards and tokenizer, made by `prepare`
    # text to prepare if dir is empty: stdlib, a file, a folder, golf:…, or hub:DATASET
    source: PathText = ""
    # key or column with the text, in .jsonl, .json, .csv and .parquet files and in hub data sets
    text_key: str = "text"
    # text files (.txt, .md, .py) are cut into documents at this text; empty: at lines that hold
    # only <|endoftext|>
    split_on: str = ""
    val_source: PathText = ""  # text for validation, instead of documents of source
    val_docs: int = 0  # documents to hold out from the start of source, instead of a fraction
    # share of the documents to hold out, drawn by split_seed, or of a single document's end; 0: 0.1
    val_fraction: float = 0.0
    split_seed: int = 0  # seed that draws the held-out documents
    max_tokens: int = 0  # training tokens to prepare at most; 0: the whole source
    # a SentencePiece .model, a tokenizer.json, or train: learn one on the source
    tokenizer: PathText = "train"
    # normalization of a learned tokenizer: identity keeps every character; nmt_nfkc, the
    # challenge's, folds whitespace and compatibility characters
    normalization: Literal["identity", "nmt_nfkc"] = "identity"
    batch_tokens: int = 524_288  # tokens of one optimizer step, over all devices
    seq_len: int = 1024  # T, tokens of one training sequence
    slices: int = 8  # runs of consecutive tokens in a batch, whatever the devices
    shuffle: bool = False  # take the stream's slices in a random order, a new one per epoch


@dataclass(frozen=True)
class TrainConfig:
    """The loop: its length, its intervals, and what it writes."""

    steps: int = 20_000  # optimizer steps
    max_seconds: float = 0.0  # seconds without compilation and validation; 0: no limit
    # most tokens in one device's microbatch; 0 or, on a command line, auto: what its memory holds
    device_batch_tokens: int = 65_536
    fsdp: int = 1  # devices that share one copy of weights and optimizer state
    shard_optimizer: bool = False  # split optimizer state and averages over all devices (ZeRO)
    seed: int = 1337  # seed of the initial weights and of data.shuffle
    # if a loss or gradient is not finite: end the run, or skip the step
    nonfinite: Literal["stop", "skip"] = "stop"
    # skip steps whose loss or gradient norm exceeds the last 128 steps' mean by this many standard
    # deviations; 0: never
    spike_sigma: float = 0.0
    max_skipped_steps: int = 10  # more skipped steps in a row end the run
    log_every: int = 1  # steps between lines of metrics
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # newest checkpoints to keep, beside the one with the best loss
    profile_steps: str = ""  # FIRST:LAST steps, counted from 1, to trace into the run's profile/
    deterministic: bool = False  # use no GPU operation whose bits may differ from run to run
    xla_options: tuple[str, ...] = ()  # NAME=VALUE options of XLA for the step
    compilation_cache: str = "~/.cache/sngpt_jax/xla"  # folder of compiled programs; empty: none


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training, and the sample at its end."""

    every: int = 1000  # steps between validations; 0: only at the end
    tokens: int = 0  # first validation tokens to score while training; 0: all
    # bytes that bits per byte divides by: of the text as it was read, or golf: of the text as the
    # tokenizer normalized it, as the challenge counts
    byte_count: ByteCount = "text"
    device_batch_tokens: int = 65_536  # most tokens that one device scores at a time
    health_tokens: int = 65_536  # tokens that measure the health of the sparse codes; 0: none
    weights: Weights = "final"  # weights that other commands take: of the last step, or averaged
    sample_prompt: str = ""  # prompt of the sample that a finished training prints
    sample_tokens: int = 0  # tokens of the sample; 0: no sample


@dataclass(frozen=True)
class ExportConfig:
    """How the artifact stores each group of tensors.

    A grid has one scale per row: an output channel of a matrix, or an entry of a table.
    """

    mlp_bits: int = 8  # bits of the MLPs' matrices, 2 to 8; 16: half precision, no grid
    attention_bits: int = 8  # bits of the attention's matrices
    projection_bits: int = 16  # bits of the projections behind the bigram and value tables
    embed_bits: int = 8  # bits of the token embedding and of learned positions
    table_bits: int = 8  # bits of the bigram and value tables
    late_key_layers: int = 0  # last layers whose key matrix stays in half precision
    passthrough_size: int = 0  # tensors of at most this many weights stay in half precision
    # dtype of gains, scales, gates, mixing weights and statistics
    control_dtype: Literal["float16", "float32"] = "float32"
    # codes of b bits: symmetric, -q to q with q = 2^(b-1) - 1; full: also -q - 1
    codes: Literal["symmetric", "full"] = "symmetric"
    # range of a matrix row: largest magnitude, a percentile, the best of several, or clip_sd
    clip: Clip = "row_max"
    table_clip: Clip = "row_max"  # range of a row of an embedding or table
    clip_percentile: float = 99.99984  # percentile of a row's magnitudes, for percentile
    # scope of search, which minimizes the squared error
    clip_scope: Literal["row", "matrix"] = "row"
    clip_sd: float = 12.85  # range of a matrix row in its standard deviations, for sd (SDClip)
    table_clip_sd: float = 20.0  # range of a table row in its standard deviations, for sd
    clip_floor: float = 0.0  # smallest range of a row
    table_clip_floor: float | None = None  # smallest range of a row of a table; None: clip_floor
    table_codes: Literal["as_matrices", "symmetric", "full"] = "as_matrices"  # codes of tables
    prune_fraction: float = 0.0  # share of smallest weights of each tensor that become 0 first
    gptq: bool = False  # round matrices by their effect on training text (GPTQ)
    # GPTQ adds this share of their mean to the diagonal of the inputs' second moments
    gptq_damping: float = 0.01
    gptq_block: int = 128  # columns that GPTQ rounds before it updates the later columns
    gptq_tokens: int = 131_072  # training tokens that measure the second moments for GPTQ
    packed: bool = False  # pack codes of fewer than 8 bits; False: a byte per code
    # compression; rans codes by measured frequencies and leaves other bytes to zstd
    codec: Literal["rans", "zstd", "lzma"] = "rans"
    codec_level: int = 22  # effort: 1 to 22 for zstd, 0 to 9 for lzma


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with other values, such as `model={"num_layers": 6}, train={"steps": 7}`."""
    parts = {name: replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return replace(config, **parts)


def flat(config: Config) -> dict[str, Any]:
    """The values by `section.field`."""
    return {
        f"{section}.{name}": value
        for section, values in vars(config).items()
        for name, value in vars(values).items()
    }


def parse_levels(text: str) -> tuple[Level, ...]:
    """The levels in "n,k,degree;n,k,degree;…". Raises `ConfigError` for any other form."""
    try:
        return tuple(Level(*map(int, row.split(","))) for row in text.split(";") if text)
    except (ValueError, TypeError):
        raise ConfigError(
            f'model.levels = {text!r} is not of the form "n,k,degree;n,k,degree;...",'
            ' such as "10,16,0;15,32,256"'
        ) from None


def format_levels(levels: tuple[Level, ...]) -> str:
    """The text that `parse_levels` reads."""
    return ";".join(",".join(map(str, level)) for level in levels)


def profile_window(train: TrainConfig) -> tuple[int, int] | None:
    """First and last step to trace, from `train.profile_steps` ("5:8"); None if it is empty."""
    if not train.profile_steps:
        return None
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", train.profile_steps)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= train.steps:
        raise ConfigError(
            f"train.profile_steps = {train.profile_steps!r} is not FIRST:LAST"
            f" with 1 <= FIRST <= LAST <= train.steps = {train.steps}"
        )
    return first, last


def microbatches(tokens: int, device_tokens: int, seq_len: int, num_devices: int) -> int:
    """The fewest equal microbatches of a step of `tokens` with at most `device_tokens` per device.

    There is one microbatch if `device_tokens` is 0.

    Raises `ConfigError` if the devices cannot share the sequences equally.
    """
    per_device, rest = divmod(tokens // seq_len, num_devices)
    if rest:
        raise ConfigError(
            f"data.batch_tokens = {tokens} is {tokens // seq_len} sequences of data.seq_len ="
            f" {seq_len}, which do not divide over {num_devices} devices"
        )
    counts = (n for n in range(1, per_device + 1) if per_device % n == 0)
    most = device_tokens or tokens
    return next(n for n in counts if per_device // n * seq_len <= most)


def to_json(config: Config) -> str:
    """The text of `config.json`. It holds every field, so a replay survives changed defaults."""
    return json.dumps({"format": FORMAT, **asdict(config)}, indent=2) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """A line `section.field: old -> new` per field in which two configurations differ."""
    after = flat(new)
    return [
        f"{name}: {value!r} -> {after[name]!r}"
        for name, value in flat(old).items()
        if value != after[name]
    ]
