"""An export beside the published script's own form of the same codes: `bench export
--against-published`.

A script writes all tensors into one file, as PyTorch stores them, and compresses the file whole.
Here the file has the codes, scales and floats of all tensors and none of PyTorch's framing.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sngpt_jax.artifact import codecs, fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.account import entropy_of
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.packing import pack
from sngpt_jax.artifact.parallel import in_threads
from sngpt_jax.artifact.quantize import Quantized, Stored
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench.harness import Say, table_head, table_row
from sngpt_jax.config import Config, ExportConfig

_BYTES = Storage(packed=False, codec="zstd", level=22)
# how each submission stored the codes: submission, form
FORMS = {
    "golf_11l_xsa4": ("#333", _BYTES),
    "golf_10l_int5mlp": ("#465", _BYTES),
    "golf_12l_recycled": ("#1573", Storage(packed=True, codec="lzma", level=9)),
    "golf_9l_xsa_ngram": ("#740", _BYTES),
}


def check(recipe: str) -> None:
    """Raises `UserError` for a recipe that is no submission."""
    if recipe not in FORMS:
        raise UserError(f"--against-published: {recipe} is none of {', '.join(FORMS)}")


def as_published(recipe: str, export: ExportConfig) -> ExportConfig:
    """The policy with the submission's packing and codec."""
    form = FORMS[recipe][1]
    return replace(export, packed=form.packed, codec=form.codec, codec_level=form.level)


def script_bytes(stored: Mapping[str, Stored], form: Storage) -> int:
    """The bytes of the script's compressed file."""
    parts = []
    for x in stored.values():
        if not isinstance(x, Quantized):
            parts.append(x.tobytes())
        elif form.packed and x.bits < 8:
            parts += [pack(x.codes.reshape(-1), x.bits, x.q_min), x.scales.tobytes()]
        else:
            parts += [x.codes.tobytes(), x.scales.tobytes()]
    return len(codecs.compress(b"".join(parts), form.byte_codec, form.level))


def compare(recipe: str, config: Config, stored: Mapping[str, Stored], say: Say) -> dict[str, Any]:
    """Bytes by form, and how near the entropy coder comes to the entropy of the codes of each
    tensor.
    """
    submission, form = FORMS[recipe]
    published = fit.storage_of(as_published(recipe, config.export))
    grids = [x for x in stored.values() if isinstance(x, Quantized)]
    sizes = {
        f"the script of {submission}, {form.codec}{' packed' * form.packed}": script_bytes(
            stored, form
        ),
        "here, in the script's form": len(artifact.encode({}, stored, published).data),
        "here, by the recipe": len(artifact.encode({}, stored, fit.storage_of(config.export)).data),
    }
    jobs = [(x.codes.size, partial(codecs.encode_codes, x.codes, x.bits, x.q_min)) for x in grids]
    coded, entropy = sum(map(len, in_threads(jobs))), sum(map(entropy_of, grids)) / 8
    script = next(iter(sizes.values()))
    say(table_head(["form of the same codes", "bytes", "divided by the script's"]))
    for name, size in sizes.items():
        say(table_row([name, f"{size:,}", f"{size / script:.4f}"]))
    say(f"rANS takes {coded:,} bytes, {coded / entropy:.4f} x the entropy of each tensor's codes")
    return {"bytes": sizes, "coded_bytes": coded, "entropy_bytes": entropy}
