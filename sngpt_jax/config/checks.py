"""The limits of a configuration: `validate` names the fields of every impossible combination."""

import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from sngpt_kernels.cayley import dictionary

from sngpt_jax.config import Config, ConfigError, ModelConfig, flat, format_levels, profile_window

# Smallest and largest value of a number in a field, and the most entries of a list. A file that
# asks for more than any machine trains is refused before anything is computed from it.
_BOUNDS = {
    "model.vocab_size": (1, 2**16),  # tokens are stored as uint16
    "model.num_layers": (1, 256),
    "model.d_model": (1, 2**16),
    "model.num_heads": (1, 2**12),
    "model.num_kv_heads": (1, 2**12),
    "model.mlp_dim": (1, 2**18),
    "model.levels": (0, 16),
    "model.max_seq_len": (1, 2**20),
    "model.value_embed_layers": (0, 256),
    "model.value_embed_dim": (1, 2**16),
    "model.recycle_layers": (0, 256),
    "model.bigram_buckets": (0, 2**16),
    "model.bigram_dim": (1, 2**16),
    "optim.newton_schulz_steps": (1, 100),
    "optim.warmdown_fraction": (0, 1),
    "optim.final_lr_fraction": (0, 1),
    "optim.adam_final_lr_fraction": (0, 1),
    "optim.swa_below": (0, 1),
    "optim.qat_below": (0, 1),
    "data.val_fraction": (0, 0.999),
    "data.split_seed": (0, 2**32 - 1),
    "data.batch_tokens": (1, 2**28),
    "data.seq_len": (1, 2**20),
    "data.slices": (1, 2**28),
    "train.steps": (1, 2**53),
    "train.device_batch_tokens": (0, 2**53),
    "train.fsdp": (1, 2**53),
    "train.seed": (0, 2**32 - 1),  # what jax.random.key keeps of a seed
    "train.max_skipped_steps": (1, 2**53),
    "train.log_every": (1, 2**53),
    "train.keep_checkpoints": (1, 2**53),
    "eval.device_batch_tokens": (1, 2**53),
    "export.clip_percentile": (50, 100),
    "export.gptq_block": (1, 2**53),
}
# a float64 holds whole numbers up to 2^53 exactly; other floats have no upper limit
_OTHER_BOUNDS = (0, 2**53)
_LONGEST = 2**16  # characters of a text, entries of a list
# control characters except tabs and line ends: a terminal would obey them
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# Fields that one family alone reads
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


def validate(config: Config) -> Config:
    """Returns `config`. Raises `ConfigError` that names every field of every problem."""
    problems = list(_out_of_bounds(config))
    if not problems:  # the divisions in the relations need bounded values
        problems = [reason for impossible, reason in _relations(config) if impossible]
    if problems:
        raise ConfigError("configuration: " + "; ".join(problems))
    return config


def _out_of_bounds(config: Config) -> Iterator[str]:
    for name, value in flat(config).items():
        lowest, highest = _BOUNDS.get(name, _OTHER_BOUNDS)
        if isinstance(value, str | tuple):
            most = highest if name in _BOUNDS else _LONGEST
            unit = "characters" if isinstance(value, str) else "entries"
            if len(value) > most:
                yield f"{name} has {len(value)} {unit}; at most {most} are allowed"
            elif _CONTROL.search("".join(map(str, value))):
                yield f"{name} = {value!r} holds a control character"
            elif any(isinstance(item, int) and item < 0 for item in value):
                yield f"{name} = {value} holds a negative number"
        elif value is None or isinstance(value, bool):
            continue
        elif not math.isfinite(value):
            yield f"{name} = {value} is not a finite number"
        elif value < lowest:
            yield f"{name} = {value} is less than {lowest}"
        elif value > highest and (name in _BOUNDS or isinstance(value, int)):
            yield f"{name} = {value} exceeds {highest}"


def _is_utf8(text: str) -> bool:
    """Whether `text` is text, and no bytes of a file's name that Python could not decode."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _relations(config: Config) -> Iterator[tuple[object, str]]:
    """Pairs of whether a combination is impossible, and the reason that its message gives."""
    m, o, d, t = config.model, config.optim, config.data, config.train
    e, x, values = config.eval, config.export, flat(config)

    def of(name: str) -> str:
        """The field with its value: `model.d_model = 512`."""
        return f"{name} = {values[name]}"

    for larger, smaller in pairwise(("model.d_model", "model.num_heads", "model.num_kv_heads")):
        ragged = values[larger] % values[smaller]
        yield ragged, f"{of(larger)} is not divisible by {of(smaller)}"
    for name in ("data.dir", "data.source", "data.val_source", "data.tokenizer"):
        where = f"{of(name)} begins with ~, which only a command line expands; give the whole path"
        yield str(values[name]).startswith("~"), where
        # config.json could not hold it
        yield not _is_utf8(str(values[name])), f"{of(name)} is not UTF-8; rename the file or folder"
    both = f"{of('data.val_docs')} and {of('data.val_fraction')} exclude each other; set one to 0"
    yield d.val_docs and d.val_fraction, both
    unit = d.slices * d.seq_len
    yield (
        m.attention == "fa4_jax" and t.deterministic,
        f"{of('model.attention')} adds gradients in no fixed order; it does not support"
        f" {of('train.deterministic')}",
    )
    yield (
        d.batch_tokens % unit,
        f"{of('data.batch_tokens')} is not divisible by data.slices x data.seq_len = {d.slices} x"
        f" {d.seq_len} = {unit}",
    )
    for smaller, larger in (
        ("data.seq_len", "model.max_seq_len"),
        ("model.xsa_layers", "model.num_layers"),
        ("export.late_key_layers", "model.num_layers"),
        ("optim.swa_every", "train.steps"),
    ):
        yield values[smaller] > values[larger], f"{of(smaller)} exceeds {of(larger)}"
    for name in ("model.rope_base", "export.clip_sd", "export.table_clip_sd"):
        yield values[name] <= 0, f"{of(name)} must be greater than 0"
    for name, used in (
        ("train.device_batch_tokens", t.device_batch_tokens),
        ("eval.device_batch_tokens", True),
        ("eval.tokens", e.tokens),
        ("eval.health_tokens", m.levels and e.health_tokens),
        ("export.gptq_tokens", x.gptq),
    ):
        too_few = used and values[name] < d.seq_len
        yield too_few, f"{of(name)} is less than one sequence, {of('data.seq_len')}"
    yield from _model_relations(m, of)

    falls, by_steps = o.schedule == "linear_warmdown", o.warmdown_clock == "steps"
    yield (
        falls and bool(o.warmdown_steps) == bool(o.warmdown_fraction),
        f"{of('optim.schedule')} needs exactly one of optim.warmdown_steps and"
        " optim.warmdown_fraction",
    )
    for name in ("warmdown_steps", "warmdown_fraction", "swa_every", "qat_below"):
        unused = not falls and getattr(o, name)
        yield unused, f"{of(f'optim.{name}')} needs a warmdown; {of('optim.schedule')}"
    yield (
        not falls and o.adam_final_lr_fraction is not None,
        f"{of('optim.adam_final_lr_fraction')} needs a warmdown; {of('optim.schedule')}",
    )
    momenta = "muon_momentum muon_momentum_start normuon_beta2 adam_b1 adam_b2 ema_decay"
    for name in momenta.split():
        yield getattr(o, name) >= 1, f"{of(f'optim.{name}')} must be less than 1"
    yield (
        not by_steps and not t.max_seconds,
        f"{of('optim.warmdown_clock')} needs train.max_seconds",
    )
    ramps = o.warmup_steps + o.warmdown_steps
    yield (
        falls and by_steps and ramps > t.steps,
        f"optim.warmup_steps + optim.warmdown_steps = {ramps} exceeds {of('train.steps')}",
    )
    yield (
        o.grad_clip_scope == "device" and not o.grad_clip,
        f"{of('optim.grad_clip_scope')} clips nothing with {of('optim.grad_clip')}",
    )
    for name, begins in (("optim.swa_below", o.swa_every), ("optim.qat_below", o.qat_below)):
        never = begins and values[name] <= o.final_lr_fraction
        yield never, f"{of(name)} is never reached with {of('optim.final_lr_fraction')}"
    for average, name in (("swa", "optim.swa_every"), ("ema", "optim.ema_decay")):
        yield e.weights == average and not values[name], f"{of('eval.weights')} needs {name}"
    try:
        profile_window(t)
    except ConfigError as error:
        yield True, str(error)
    for option in t.xla_options:
        named = re.fullmatch(r"xla_\w+=.*", option)
        file = re.search(
            r"^[^=]*(dump|_dir|file|path|_from=|_to=|flags|extra_options|results)|=.*[/\\]", option
        )
        yield not named, f"train.xla_options: {option!r} is not of the form xla_NAME=VALUE"
        yield (
            named and file,
            f"train.xla_options: {option!r} names files; set it in XLA_FLAGS instead",
        )

    for name in ("mlp_bits", "attention_bits", "projection_bits", "embed_bits", "table_bits"):
        bits = getattr(x, name)
        yield bits not in {*range(2, 9), 16}, f"export.{name} = {bits} is neither 2 to 8 nor 16"
    yield x.prune_fraction >= 1, f"{of('export.prune_fraction')} leaves no weights"
    yield (
        x.clip_scope == "matrix" and "search" not in (x.clip, x.table_clip),
        f"{of('export.clip_scope')} needs export.clip or export.table_clip = search",
    )
    yield (
        x.packed and x.codec == "rans",
        f"{of('export.packed')} leaves no codes for {of('export.codec')} to count",
    )
    lowest, highest = {"zstd": (1, 22), "lzma": (0, 9), "rans": (1, 22)}[x.codec]
    yield (
        not lowest <= x.codec_level <= highest,
        f"{of('export.codec_level')} is not a level of {of('export.codec')}: {lowest} to {highest}",
    )
    yield (
        x.gptq and x.prune_fraction,
        f"export.gptq moves the weights that {of('export.prune_fraction')} sets to 0; use one",
    )


def _model_relations(m: ModelConfig, of: Callable[[str], str]) -> Iterator[tuple[object, str]]:
    others = _PRE_NORM_ONLY if m.family == "compact" else _COMPACT_ONLY
    unread = [(name, of("model.family")) for name in others]
    if m.family == "pre_norm" and not m.levels:
        unread += [(name, "no model.levels") for name in ("generators", "forward_standardized")]
    levels = repr(format_levels(m.levels))
    for name, why in unread:
        value = getattr(m, name)
        shown = levels if name == "levels" else repr(value)
        unlike = value != getattr(ModelConfig, name)
        yield unlike, f"model.{name} = {shown} does nothing with {why}"
    yield (
        not m.d_model % m.num_heads and m.head_dim % 2 and m.positions == "rotary",
        f"model.d_model / model.num_heads = {m.head_dim} is odd; rotary positions need an even"
        " head size",
    )
    yield (
        m.attention in ("cudnn", "tokamax", "fa4_jax") and m.compute_dtype == "float32",
        f"{of('model.attention')} does not support {of('model.compute_dtype')}",
    )
    yield (
        m.positions == "learned" and (m.rope_dims or m.rope_ntk_len),
        f"model.rope_dims and model.rope_ntk_len do nothing with {of('model.positions')}",
    )
    yield (
        m.rope_dims % 2 or m.rope_dims > m.head_dim,
        f"{of('model.rope_dims')} is not an even number up to the head size, {m.head_dim}",
    )
    yield (
        m.rope_ntk_len and m.rotary_dims <= 2,
        f"model.rope_ntk_len needs at least 4 rotary dimensions; the model has {m.rotary_dims}",
    )
    yield (
        m.rope_ntk_len >= m.max_seq_len,
        f"{of('model.rope_ntk_len')} is never exceeded with {of('model.max_seq_len')}",
    )
    layers = m.value_embed_layers
    yield (
        len(set(layers)) < len(layers) or max(layers, default=0) >= m.num_layers,
        f"{of('model.value_embed_layers')} are not distinct layers from 0 to {m.num_layers - 1}",
    )
    yield (
        max(m.recycle_layers, default=-1) >= m.num_skips,
        f"{of('model.recycle_layers')} are not all in the first half, layers 0 to"
        f" {m.num_skips - 1}",
    )
    unread_mask = f"model.smear_mask_bos does nothing with {of('model.smear')}"
    yield m.smear_mask_bos and m.smear == "none", unread_mask
    yield (
        m.smear_mask_bos and m.bos_id >= m.vocab_size,
        f"{of('model.bos_id')} is not below {of('model.vocab_size')}",
    )
    yield m.bigram_buckets == 1, "model.bigram_buckets = 1 is neither 0 nor 2 to 65536"
    if m.family == "pre_norm" and m.levels:
        try:
            dictionary.check_levels(m.levels, m.d_model, m.generators)
        except ValueError as error:
            yield True, f"model.levels = {levels} with {of('model.d_model')}: {error}"
