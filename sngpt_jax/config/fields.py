"""The configuration of a run: frozen dataclasses.

The comment beside a field is its `--help` text. `recipe.py` reads configurations from files and
the command line, `checks.py` knows what cannot be combined.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from sngpt_jax.base.errors import UserError

FORMAT = 1  # of config.json; `config_file` says when it is raised

# those after the last step, the mean of snapshots, the exponential moving average
Weights = Literal["final", "swa", "ema"]


class ConfigError(UserError):
    """A configuration that cannot be read or cannot run; names the fields and what would do."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: a GPT with tied embeddings. Fields that only one family takes say so."""

    # with U-Net skips and residual mixing; or plain, with gains
    family: Literal["compact", "pre_norm"] = "compact"
    vocab_size: int = 1024  # V, tokens in the vocabulary; no fewer than the tokenizer has
    # L, transformer blocks; in the compact family the first half saves skips for the second
    num_layers: int = 9
    d_model: int = 512  # D, width of the residual stream
    num_heads: int = 8  # H, query heads
    num_kv_heads: int = 4  # K, key/value heads; each serves num_heads / num_kv_heads query heads
    mlp_dim: int = 1024  # F, hidden width of the MLP; any, such as int(2.75 * d_model)
    # relu(h)^2, leaky_relu(h, slope 0.5)^2, exact GELU
    mlp_activation: Literal["relu2", "leaky_relu2", "gelu"] = "relu2"
    levels: str = ""  # CayleySAE before each MLP, "n,k,degree;..." a level; empty: none (pre_norm)
    # children of a feature: spread over the ids, or a prefix tree
    generators: Literal["spread", "prefix"] = "spread"
    # the code carries standardized scores; false: they select, raw scores are carried
    forward_standardized: bool = True
    max_seq_len: int = 1024  # longest sequence the model takes
    # turned into queries and keys, or a table added (pre_norm)
    positions: Literal["rotary", "learned"] = "rotary"
    # queries and keys are normalized, queries have a gain for each head; false: taken raw
    # (pre_norm)
    qk_norm: bool = True
    rope_dims: int = 0  # leading dimensions of a head that rotary positions turn; 0: all of them
    rope_base: float = 10_000.0  # rotary base; larger turns slower
    # sequences longer than this raise the rotary base to match (NTK scaling); 0: never
    rope_ntk_len: int = 0
    q_gain_init: float = 1.5  # initial per-head gain on the normalized queries
    # last so many layers remove each position's own value direction from its attention output (XSA)
    xsa_layers: int = 0
    attention_gate: bool = False  # each head's output times a sigmoid of the layer's input
    # layers after the first mix the first layer's values into theirs (compact)
    value_residual: bool = False
    # layers, from 0, that add an embedding of the token to its values (compact)
    value_embed_layers: tuple[int, ...] = ()
    value_embed_dim: int = 128  # width of that embedding's table, shared by the layers
    # layers of the first half applied again between the halves, in order (compact)
    recycle_layers: tuple[int, ...] = ()
    ln_scale: bool = False  # normalized inputs of layer i times 1 / sqrt(i + 1) (compact)
    # of each embedding with the one before (compact)
    smear: Literal["none", "after_norm", "before_norm"] = "none"
    # the start of a document takes nothing from the document before it
    smear_mask_bos: bool = False
    bos_id: int = 1  # token that starts a document, for smear_mask_bos
    # rows of the table that embeds hashed pairs of tokens; 0: none (compact)
    bigram_buckets: int = 0
    bigram_dim: int = 128  # width of that table
    # of the two multiplied ids; xor keeps a bucket for a sequence's start
    bigram_hash: Literal["xor", "sum"] = "xor"
    bigram_init_std: float = 0.0  # standard deviation of that table at the start
    # singular values of its projection at the start, with matrix_init = orthogonal
    bigram_proj_gain: float = 1.0
    bigram_scale_init: float = 0.05  # learned factor on its output, at the start; 0: no such factor
    # but for normal, outputs start at 0
    matrix_init: Literal["fan_in_uniform", "orthogonal", "normal"] = "fan_in_uniform"
    # with normal; those of the outputs into the stream are divided by sqrt(2 L)
    matrix_init_std: float = 0.02
    # standard deviation of the token embedding, and of learned positions, at the start
    embed_init_std: float = 0.005
    # overtone: singular values then fall as 1 / sqrt(rank)
    embed_init: Literal["normal", "overtone"] = "normal"
    # phase: early layers start from the embedding (compact)
    resid_mix_init: Literal["identity", "phase"] = "identity"
    logit_soft_cap: float = 30.0  # logits become cap * tanh(logits / cap); 0: no cap
    # tokens whose logits exist at a time in the loss, for large vocabularies; 0: all
    logit_chunk: int = 0
    norm_eps: float = 1.1920929e-7  # added to the mean square in every RMSNorm
    # auto: bfloat16 on an accelerator, float32 on a CPU
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # auto: what sngpt_kernels.xsa knows as fastest here
    attention: Literal["auto", "xla", "cudnn", "pallas_triton"] = "auto"
    # of the sparse codes; auto: pallas_triton on an NVIDIA GPU
    code: Literal["auto", "xla", "pallas_triton"] = "auto"

    @property
    def head_dim(self) -> int:
        """h, the size of one attention head."""
        return self.d_model // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """r, the leading dimensions of a head that rotary positions turn."""
        return self.rope_dims or self.head_dim

    @property
    def cayley_levels(self) -> tuple[tuple[int, int, int], ...]:
        """`levels` as (n, k, degree) of each. Raises `ConfigError` where the text is of another
        form.
        """
        try:
            rows = tuple(
                tuple(int(number) for number in row.split(","))
                for row in self.levels.split(";")
                if self.levels
            )
            return tuple((n, k, degree) for n, k, degree in rows)
        except ValueError:
            raise ConfigError(
                f'model.levels = {self.levels!r} is not of the form "n,k,degree;n,k,degree;...",'
                ' such as "10,16,0;15,32,256"'
            ) from None

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
    # of the matrices behind those tables: as blocks' matrices, or scalars
    projection_rule: Literal["muon", "adam"] = "muon"
    muon_weight_decay: float = 0.0  # decoupled, times the scheduled learning rate
    adam_weight_decay: float = 0.0  # decoupled, times the scheduled learning rate
    muon_momentum: float = 0.95  # Nesterov momentum after its warmup
    muon_momentum_start: float = 0.85  # momentum at step 0, raised linearly
    muon_momentum_warmup_steps: int = 500  # steps that the raise takes; 0: none
    # in which Muon's momentum is kept
    muon_momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    newton_schulz_steps: int = 5  # iterations of the orthogonalization
    # of the orthogonalization's products
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # one polynomial, or the best for each iteration
    muon_coefficients: Literal["quintic", "polar_express"] = "quintic"
    # decay of each neuron's mean squared update, which evens them out (NorMuon); 0: not done
    normuon_beta2: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.0  # largest global L2 norm of the gradient; 0: no clipping
    # device: each device's own gradient, before they are averaged
    grad_clip_scope: Literal["global", "device"] = "global"
    # the shape of the rate after its warmup
    schedule: Literal["constant", "linear_warmdown"] = "linear_warmdown"
    warmup_steps: int = 0  # linear rise of the learning rates from 0
    # linear fall to final_lr_fraction over the last so many steps; or give warmdown_fraction
    warmdown_steps: int = 0
    warmdown_fraction: float = 0.0  # the same as a share of the run, 0 to 1
    # wall_clock: the fall ends at train.max_seconds
    warmdown_clock: Literal["steps", "wall_clock"] = "steps"
    final_lr_fraction: float = 0.0  # of the peak rates, at the end of the warmdown
    # the same for Adam's rates, where they end elsewhere; none: as above
    adam_final_lr_fraction: float | None = None
    # of the exponential moving average of the weights, a step; 0: none is kept
    ema_decay: float = 0.0
    swa_every: int = 0  # steps between snapshots of the mean of the weights (SWA); 0: none is kept
    # snapshots are taken once the warmdown has brought the learning rates below this fraction
    swa_below: float = 0.5
    # in which averages of embedding tables are kept
    average_table_dtype: Literal["float32", "bfloat16"] = "float32"
    # weights are put on the exported grid once the warmdown has gone below this fraction; 0: never
    qat_below: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how a step takes them."""

    # folder with shards and tokenizer, made by `sngpt_jax.prepare`
    dir: str = "data/fineweb_sp1024"
    # what to prepare when dir is empty: stdlib, a file or folder of text, golf:…, or hub:DATASET
    source: str = ""
    val_source: str = ""  # validation text of its own; empty: the source's first val_docs documents
    val_docs: int = 50_000  # documents held out for validation when there is no val_source
    max_tokens: int = 0  # training tokens after which a preparation stops; 0: all of the source
    # a SentencePiece .model, a tokenizer.json, or train: learn one on the source
    tokenizer: str = "train"
    # of a learnt tokenizer; identity keeps all whitespace
    normalization: Literal["nmt_nfkc", "identity"] = "nmt_nfkc"
    batch_tokens: int = 524_288  # tokens of one optimizer step, over all devices
    seq_len: int = 1024  # T, tokens of one training sequence
    # runs of consecutive tokens in a batch; data order depends on it, never on the devices
    slices: int = 8
    # take the stream's slices in a random order, new each epoch, instead of one after the other
    shuffle: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, and what it leaves behind."""

    steps: int = 20_000  # optimizer steps
    # wall-clock training time that ends the run, compilation and validation left out; 0: no cap
    max_seconds: float = 0.0
    # most tokens in one device's microbatch; the rest is gradient accumulation
    device_batch_tokens: int = 65_536
    # devices over which each copy of the weights and optimizer state is spread; 1: every device
    # has all
    fsdp: int = 1
    # optimizer state and averages spread over all devices, whatever fsdp is (ZeRO)
    shard_optimizer: bool = False
    seed: int = 1337  # of the initial weights and of data.shuffle
    # a loss or gradient that is not finite ends the run, or its step does nothing
    nonfinite: Literal["stop", "skip"] = "stop"
    # a step does nothing whose loss or gradient is so many deviations above the last 128's; 0:
    # never
    spike_sigma: float = 0.0
    max_skipped_steps: int = 10  # steps in a row that may do nothing; one more ends the run
    log_every: int = 1  # steps between lines of metrics
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # newest ones kept, beside the one with the best validation loss
    # FIRST:LAST steps, counted from 1, to trace into the run's profile/ folder, for xprof
    profile_steps: str = ""
    # on a GPU no operation whose bits may differ from run to run; slower, not measured
    deterministic: bool = False
    # NAME=VALUE for XLA's compiler of the step, over those of sngpt_jax.training.compiler
    xla_options: tuple[str, ...] = ()
    # folder of compiled programs shared by runs; empty: none
    compilation_cache: str = "~/.cache/sngpt_jax/xla"


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training, and the sample at its end."""

    every: int = 1000  # steps between validations while training; 0: only at the end
    tokens: int = 0  # validation tokens scored while training, from the start of the stream; 0: all
    device_batch_tokens: int = 65_536  # most tokens one device scores at a time, also in `evaluate`
    # tokens of each validation on which the health of the sparse codes is measured; 0: never
    health_tokens: int = 65_536
    weights: Weights = "final"  # which ones the other commands take: the last step's, or an average
    sample_prompt: str = ""  # prompt of the sample that a finished training run prints
    sample_tokens: int = 0  # length of that sample; 0: none


Clip = Literal["row_max", "percentile", "search", "sd"]


@dataclass(frozen=True)
class ExportConfig:
    """How the artifact keeps each group of tensors. A grid has one scale for each row: an output
    channel, a table's entry.

    Late quantization-aware training imitates the matrices' grid.
    """

    mlp_bits: int = 8  # of the MLPs' matrices, 2 to 8; 16: half precision, no grid
    attention_bits: int = 8  # of the attention's matrices
    projection_bits: int = 16  # of the matrices behind the bigram and value tables
    embed_bits: int = 8  # of the token embedding and of learned positions
    table_bits: int = 8  # of the bigram and value tables
    late_key_layers: int = 0  # last so many layers keep their key matrix in half precision
    passthrough_size: int = 0  # tensors of at most so many weights are kept in half precision
    # of gains, scales, gates, mixing weights and statistics
    control_dtype: Literal["float16", "float32"] = "float32"
    # b bits are -q to q, q = 2^(b-1) - 1; full: also -q - 1
    codes: Literal["symmetric", "full"] = "symmetric"
    # a matrix row's range: its largest magnitude, a percentile, the best of several, or clip_sd
    clip: Clip = "row_max"
    table_clip: Clip = "row_max"  # the same for embeddings and tables
    clip_percentile: float = 99.99984  # of a row's magnitudes, for percentile
    # search takes the percentile of least squared error for each of these
    clip_scope: Literal["row", "matrix"] = "row"
    # for sd: a matrix row's range in standard deviations of the row (SDClip)
    clip_sd: float = 12.85
    table_clip_sd: float = 20.0  # the same for embeddings and tables
    clip_floor: float = 0.0  # least range of a row; its scale is then at least this / q
    # of each matrix's and table's weights, the smallest, that are set to 0 first
    prune_fraction: float = 0.0
    # round matrices by what they do to training text (GPTQ), not one weight at a time
    gptq: bool = False
    # added to the diagonal of the inputs' second moments, as a share of its mean
    gptq_damping: float = 0.01
    gptq_block: int = 128  # columns rounded between updates of the columns after them
    # tokens of the training shards that the second moments are taken over
    gptq_tokens: int = 131_072
    # codes of fewer than 8 bits are put together bit by bit before the codec; else a byte each
    packed: bool = False
    # rans codes by measured frequencies; what is no code goes by zstd
    codec: Literal["rans", "zstd", "lzma"] = "rans"
    codec_level: int = 22  # of zstd, 1 to 22; of lzma, 0 to 9


@dataclass(frozen=True)
class Config:
    """One recipe, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def profile_window(train: TrainConfig) -> tuple[int, int] | None:
    """First and last step to trace, from `train.profile_steps` ("5:8"), or None where it is empty."""
    if not train.profile_steps:
        return None
    first, colon, last = train.profile_steps.partition(":")
    if not (
        colon
        and first.isdecimal()
        and last.isdecimal()
        and 1 <= int(first) <= int(last) <= train.steps
    ):
        raise ConfigError(
            f"train.profile_steps = {train.profile_steps!r} is not FIRST:LAST"
            f" with 1 <= FIRST <= LAST <= train.steps = {train.steps}"
        )
    return int(first), int(last)


def microbatches(tokens: int, device_tokens: int, seq_len: int, num_devices: int) -> int:
    """The fewest equal microbatches of a step of `tokens` that keep each device within
    `device_tokens` whole sequences' tokens.

    Raises `ConfigError` where the sequences of a step cannot be dealt out evenly to the devices.
    """
    sequences = tokens // seq_len
    if sequences % num_devices:
        raise ConfigError(
            f"data.batch_tokens = {tokens} is {sequences} sequences of data.seq_len = {seq_len},"
            f" which do not divide over {num_devices} devices"
        )
    per_device = sequences // num_devices
    return next(
        n
        for n in range(1, per_device + 1)
        if per_device % n == 0 and per_device // n * seq_len <= device_tokens
    )


def to_json(config: Config) -> str:
    """The text of `config.json`: every field, so that a later change of a default does not change
    a replay.
    """
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """One line a field in which two configurations differ: `section.field: old -> new`."""
    return [
        f"{section.name}.{f.name}: {a!r} -> {b!r}"
        for section in dataclasses.fields(old)
        for f in dataclasses.fields(getattr(old, section.name))
        if (a := getattr(getattr(old, section.name), f.name))
        != (b := getattr(getattr(new, section.name), f.name))
    ]
