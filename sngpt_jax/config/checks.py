"""What a configuration cannot be: `validate` names every field of every impossible combination."""

import dataclasses
import math
import re
from collections.abc import Iterator

from sngpt_kernels.cayley import dictionary

from sngpt_jax.config import Config, ConfigError, ModelConfig, profile_window


def validate(config: Config) -> Config:
    """Returns `config`; raises `ConfigError` naming every field of every impossible combination."""
    problems = list(_problems(config))
    if problems:
        raise ConfigError("configuration: " + "; ".join(problems))
    return config


# What no machine trains: a file that asks for more is refused before anything of it is computed.
_MOST = {
    "model.num_layers": 256,
    "model.d_model": 2**16,
    "model.num_heads": 2**12,
    "model.num_kv_heads": 2**12,
    "model.mlp_dim": 2**18,
    "model.max_seq_len": 2**20,
    "model.value_embed_layers": 256,
    "model.value_embed_dim": 2**16,
    "model.recycle_layers": 256,
    "model.bigram_dim": 2**16,
    "model.levels": 1000,
    "optim.newton_schulz_steps": 100,
    "data.batch_tokens": 2**28,
}
_MOST_ELSEWHERE = 2**53  # of other whole numbers: a float64 holds them exactly
_LONGEST = 2**16  # letters of a text, entries of a list
# all but tabs and line ends: a terminal would obey them
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _too_large(config: Config) -> Iterator[str]:
    for section in dataclasses.fields(config):
        for f in dataclasses.fields(getattr(config, section.name)):
            name, value = f"{section.name}.{f.name}", getattr(getattr(config, section.name), f.name)
            if isinstance(value, str | tuple):
                if len(value) > _MOST.get(name, _LONGEST):
                    yield (
                        f"{name} has {len(value)}"
                        f" {'letters' if isinstance(value, str) else 'entries'}"
                    )
                elif _CONTROL.search(value if isinstance(value, str) else "".join(map(str, value))):
                    yield f"{name} = {value!r} holds a control character"
            elif isinstance(value, int) and value > _MOST.get(name, _MOST_ELSEWHERE):
                yield f"{name} = {value} exceeds {_MOST.get(name, _MOST_ELSEWHERE)}"


def _problems(config: Config) -> Iterator[str]:
    if problems := list(_too_large(config)):
        yield from problems
        return
    m, o, d, t, e = config.model, config.optim, config.data, config.train, config.eval
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
        "train": (
            "steps",
            "device_batch_tokens",
            "log_every",
            "keep_checkpoints",
            "fsdp",
            "max_skipped_steps",
        ),
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
    if (
        any(getattr(m, name) < 1 for name in at_least_one["model"])
        or min(d.batch_tokens, d.seq_len, d.slices) < 1
    ):
        return  # the divisions below need them positive

    if m.d_model % m.num_heads:
        yield f"model.d_model = {m.d_model} is not divisible by model.num_heads = {m.num_heads}"
    elif m.head_dim % 2 and m.positions == "rotary":
        yield (
            f"model.d_model / model.num_heads = {m.head_dim} is odd; rotary position embedding"
            " needs an even head size"
        )
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_heads = {m.num_heads} is not divisible by model.num_kv_heads ="
            f" {m.num_kv_heads}"
        )
    if m.rope_base <= 0:
        yield f"model.rope_base = {m.rope_base} must be greater than 0"
    yield from _model_problems(m)
    if m.attention == "cudnn" and m.compute_dtype == "float32":
        yield (
            "model.attention = cudnn does not serve model.compute_dtype = float32; use bfloat16 or"
            " attention xla"
        )

    if d.seq_len > m.max_seq_len:
        yield f"data.seq_len = {d.seq_len} exceeds model.max_seq_len = {m.max_seq_len}"
    if d.batch_tokens % (d.slices * d.seq_len):
        yield (
            f"data.batch_tokens = {d.batch_tokens} is not divisible by data.slices x data.seq_len"
            f" = {d.slices} x {d.seq_len} = {d.slices * d.seq_len}"
        )
    for section_name, tokens in (("train", t.device_batch_tokens), ("eval", e.device_batch_tokens)):
        if 1 <= tokens < d.seq_len:
            yield (
                f"{section_name}.device_batch_tokens = {tokens} is less than one sequence,"
                f" data.seq_len = {d.seq_len}"
            )

    if o.schedule == "linear_warmdown":
        if bool(o.warmdown_steps) == bool(o.warmdown_fraction):
            yield (
                "optim.schedule = linear_warmdown needs exactly one of optim.warmdown_steps and"
                " optim.warmdown_fraction"
            )
    else:
        if o.warmdown_steps or o.warmdown_fraction:
            yield (
                "optim.schedule = constant takes no optim.warmdown_steps or"
                " optim.warmdown_fraction; set them to 0"
            )
        if o.swa_every or o.qat_below:
            yield (
                "optim.swa_every and optim.qat_below follow the warmdown, which optim.schedule ="
                " constant has not"
            )
    for name in (
        "warmdown_fraction",
        "final_lr_fraction",
        "adam_final_lr_fraction",
        "swa_below",
        "qat_below",
    ):
        if (getattr(o, name) or 0) > 1:
            yield f"optim.{name} = {getattr(o, name)} is more than 1"
    for name in (
        "muon_momentum",
        "muon_momentum_start",
        "normuon_beta2",
        "adam_b1",
        "adam_b2",
        "ema_decay",
    ):
        if getattr(o, name) >= 1:
            yield f"optim.{name} = {getattr(o, name)} must be less than 1"
    if o.warmdown_clock == "wall_clock" and not t.max_seconds:
        yield "optim.warmdown_clock = wall_clock needs train.max_seconds"
    if (
        o.schedule == "linear_warmdown"
        and o.warmdown_clock == "steps"
        and o.warmup_steps + o.warmdown_steps > t.steps
    ):
        yield (
            f"optim.warmup_steps + optim.warmdown_steps = {o.warmup_steps + o.warmdown_steps}"
            f" exceeds train.steps = {t.steps}"
        )
    if o.adam_final_lr_fraction is not None and o.schedule == "constant":
        yield (
            "optim.adam_final_lr_fraction is where a warmdown ends, which optim.schedule = constant"
            " has not"
        )
    if o.swa_every > t.steps:
        yield (
            f"optim.swa_every = {o.swa_every} exceeds train.steps = {t.steps}: no snapshot would"
            " ever be taken"
        )
    if o.grad_clip_scope == "device" and not o.grad_clip:
        yield "optim.grad_clip_scope = device clips nothing with optim.grad_clip = 0"
    if o.swa_every and o.swa_below <= o.final_lr_fraction:
        yield (
            f"optim.swa_below = {o.swa_below} is never reached with optim.final_lr_fraction ="
            f" {o.final_lr_fraction}"
        )
    if o.qat_below and o.qat_below <= o.final_lr_fraction:
        yield (
            f"optim.qat_below = {o.qat_below} is never reached with optim.final_lr_fraction ="
            f" {o.final_lr_fraction}"
        )
    yield from _export_problems(config)
    if e.weights == "swa" and not o.swa_every:
        yield "eval.weights = swa needs optim.swa_every"
    if e.weights == "ema" and not o.ema_decay:
        yield "eval.weights = ema needs optim.ema_decay"
    try:
        profile_window(t)
    except ConfigError as error:
        yield str(error)
    for option in t.xla_options:
        if not re.fullmatch(r"xla_\w+=.*", option):
            yield f"train.xla_options: {option!r} is not of the form xla_NAME=VALUE"
        elif re.search(
            r"^[^=]*(dump|_dir|file|path|_from=|_to=|flags|extra_options|results)|=.*[/\\]", option
        ):
            yield (
                f"train.xla_options: {option!r} names files for XLA; set it in the environment"
                " variable XLA_FLAGS instead"
            )
    if e.tokens and e.tokens < d.seq_len:
        yield f"eval.tokens = {e.tokens} is less than one sequence, data.seq_len = {d.seq_len}"
    if e.sample_tokens >= m.max_seq_len:
        yield (
            f"eval.sample_tokens = {e.sample_tokens} leaves no room for a prompt in"
            f" model.max_seq_len = {m.max_seq_len}"
        )
    if m.levels and e.health_tokens and e.health_tokens < d.seq_len:
        yield (
            f"eval.health_tokens = {e.health_tokens} is less than one sequence, data.seq_len ="
            f" {d.seq_len}"
        )
    if m.vocab_size > 2**16:
        yield f"model.vocab_size = {m.vocab_size} exceeds 65536; tokens are stored as uint16"


def _export_problems(config: Config) -> Iterator[str]:
    x = config.export
    for name in ("mlp_bits", "attention_bits", "projection_bits", "embed_bits", "table_bits"):
        if not (2 <= getattr(x, name) <= 8 or getattr(x, name) == 16):
            yield f"export.{name} = {getattr(x, name)} is neither 2 to 8 nor 16"
    if not 50 <= x.clip_percentile <= 100:
        yield f"export.clip_percentile = {x.clip_percentile} is not between 50 and 100"
    for name in ("clip_sd", "table_clip_sd"):
        if getattr(x, name) <= 0:
            yield f"export.{name} = {getattr(x, name)} must be greater than 0"
    if x.prune_fraction >= 1:
        yield f"export.prune_fraction = {x.prune_fraction} leaves no weights"
    if x.late_key_layers > config.model.num_layers:
        yield (
            f"export.late_key_layers = {x.late_key_layers} exceeds model.num_layers ="
            f" {config.model.num_layers}"
        )
    if x.clip_scope == "matrix" and "search" not in (x.clip, x.table_clip):
        yield (
            "export.clip_scope = matrix does nothing without export.clip or export.table_clip ="
            " search"
        )
    if x.packed and x.codec == "rans":
        yield (
            "export.packed = True leaves export.codec = rans no codes to count; take zstd or lzma,"
            " or leave packed out"
        )
    lowest, highest = {"zstd": (1, 22), "lzma": (0, 9), "rans": (1, 22)}[x.codec]
    if not lowest <= x.codec_level <= highest:
        yield (
            f"export.codec_level = {x.codec_level} is not one of export.codec = {x.codec}: {lowest}"
            f" to {highest}"
        )
    if x.gptq and (x.gptq_block < 1 or x.gptq_tokens < config.data.seq_len):
        yield (
            f"export.gptq needs gptq_block = {x.gptq_block} of 1 or more, and gptq_tokens ="
            f" {x.gptq_tokens} of one sequence or more, data.seq_len = {config.data.seq_len}"
        )
    if x.gptq and x.prune_fraction:
        yield (
            f"export.gptq moves the weights that export.prune_fraction = {x.prune_fraction} sets to"
            " 0; take one of them"
        )


# Fields of one family only, which the other one must leave at their defaults.
_COMPACT_ONLY = (
    "value_residual",
    "value_embed_layers",
    "recycle_layers",
    "ln_scale",
    "smear",
    "bigram_buckets",
    "resid_mix_init",
)
_PRE_NORM_ONLY = ("levels", "positions", "qk_norm", "generators", "forward_standardized")


def _model_problems(m: ModelConfig) -> Iterator[str]:
    defaults, other = (
        ModelConfig(),
        {"compact": _PRE_NORM_ONLY, "pre_norm": _COMPACT_ONLY}[m.family],
    )
    for name in other:
        if getattr(m, name) != getattr(defaults, name):
            yield f"model.{name} = {getattr(m, name)!r} does nothing with model.family = {m.family}"
    if m.family == "pre_norm" and not m.levels:
        for name in ("generators", "forward_standardized"):
            if getattr(m, name) != getattr(defaults, name):
                yield f'model.{name} = {getattr(m, name)!r} does nothing with model.levels = ""'
    if m.family == "pre_norm" and m.levels:
        try:
            dictionary.check_levels(m.cayley_levels, m.d_model, m.generators)
        except ConfigError as error:
            yield str(error)
        except ValueError as error:
            yield f"model.levels = {m.levels!r} with model.d_model = {m.d_model}: {error}"
    if m.positions == "learned" and (m.rope_dims or m.rope_ntk_len):
        yield "model.rope_dims and model.rope_ntk_len do nothing with model.positions = learned"
    if m.rope_dims % 2 or m.rope_dims > m.head_dim:
        yield (
            f"model.rope_dims = {m.rope_dims} is not an even number up to the head size,"
            f" {m.head_dim}"
        )
    if m.rope_ntk_len and m.rotary_dims <= 2:
        yield (
            f"model.rope_ntk_len has nothing to scale with {m.rotary_dims} rotary dimensions; it"
            " needs 4 or more"
        )
    if m.rope_ntk_len >= m.max_seq_len:
        yield (
            f"model.rope_ntk_len = {m.rope_ntk_len} is never exceeded with model.max_seq_len ="
            f" {m.max_seq_len}"
        )
    if m.xsa_layers > m.num_layers:
        yield f"model.xsa_layers = {m.xsa_layers} exceeds model.num_layers = {m.num_layers}"
    if (
        len(set(m.value_embed_layers)) < len(m.value_embed_layers)
        or max(m.value_embed_layers, default=0) >= m.num_layers
    ):
        yield (
            f"model.value_embed_layers = {m.value_embed_layers} are not distinct layers from 0 to"
            f" {m.num_layers - 1}"
        )
    if m.recycle_layers and max(m.recycle_layers) >= m.num_skips:
        yield (
            f"model.recycle_layers = {m.recycle_layers} are not all of the first half, layers 0 to"
            f" {m.num_skips - 1}"
        )
    if m.smear_mask_bos and m.smear == "none":
        yield "model.smear_mask_bos masks nothing with model.smear = none"
    if m.smear_mask_bos and m.bos_id >= m.vocab_size:
        yield f"model.bos_id = {m.bos_id} is not below model.vocab_size = {m.vocab_size}"
    if m.bigram_buckets == 1 or m.bigram_buckets > 2**16:
        yield f"model.bigram_buckets = {m.bigram_buckets} is neither 0 nor 2 to 65536"
