"""Mutated artifacts: each is decoded or refused, and takes no memory above the limit."""

import json
import random
import struct
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from sngpt_jax.artifact.codecs import compress
from sngpt_jax.artifact.quantize import Quantized, dequantize
from sngpt_jax.artifact.sngpt_file import ArtifactError, Encoded, decode, encode
from tests.artifact.by_hand import STORAGES, as_text, assemble, quantized, sealed, split
from tests.mutations import BYTES, edit

MEMORY_LIMIT = 300_000


def artifact(storage):
    rng = np.random.default_rng(5)
    tensors = {
        "a/up": quantized(64, 40, 5, spread=1.0),
        "a/gain": rng.standard_normal(8).astype(np.float32),
        "a/key": quantized(7, 9, 6, full=True),
        "b/table": quantized(9, 5, 8, transposed=False),
        "b/up": quantized(6, 8, 5, seed=1),  # shares the stream of a/up where codes are packed
        "b/half": rng.standard_normal((2, 3)).astype(np.float16),
        "c": np.array(2.0, np.float32),
    }
    config = {"name": "x", "lr": 0.1, "list": [1, None, True]}
    return encode({"config": config, "step": 3}, tensors, storage)


def bomb(rng, storage):
    """A stream of much more than there should be, or one that says so."""
    raw = bytes(rng.choice([0, 1, 300, 5_000, 2_000_000]))
    frame = bytearray(compress(raw, rng.choice(["zstd", "lzma", storage.byte_codec]), 1))
    if len(frame) > 14 and rng.random() < 0.4:
        at = rng.randrange(4, 14)  # where a zstd frame says its window and size
        frame[at] = rng.randrange(256)
    return bytes(frame)


def of_header(rng, data, storage):
    """The header's JSON changed, and its frame made anew."""
    text, payload = split(data)
    header = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        edit(rng, header)
    spaced = rng.random() < 0.03
    return assemble(json.dumps(header).encode() if spaced else as_text(header), payload)


def of_header_text(rng, data, storage):
    text, payload = split(data)
    return assemble(rng.choice(BYTES)(rng, text), payload)


def of_stream(rng, data, storage):
    """A stream changed or replaced, with its new length in the header; sometimes another shape."""
    text, payload = split(data)
    header = json.loads(text)
    table = header["table"]
    lengths = [(entry["grid"], "length") for entry in table["tensors"] if entry["grid"]]
    lengths += [(table, name) for name in ("scales", "float16", "float32")]
    chosen = rng.randrange(len(lengths))
    start = sum(container[key] for container, key in lengths[:chosen])
    container, key = lengths[chosen]
    stream = payload[start : start + container[key]]
    changed = bomb(rng, storage) if rng.random() < 0.25 else rng.choice(BYTES)(rng, stream)
    payload = payload[:start] + changed + payload[start + container[key] :]
    container[key] = len(changed)
    if rng.random() < 0.25:
        entry = rng.choice(table["tensors"])
        entry["shape"] = [rng.choice([1, 2, 5, 40, 64, 300, 5_000, 2**31]) for _ in entry["shape"]]
    return assemble(as_text(header), payload)


def of_frame(rng, data, storage):
    """Bytes anywhere, with the checksum made anew."""
    return sealed(rng.choice(BYTES)(rng, data[:-32]))


def of_header_frame(rng, data, storage):
    """The frame of the header changed, or a bomb in its place."""
    end = 24 + struct.unpack_from("<I", data, 12)[0]
    is_bomb = rng.random() < 0.3
    frame = bomb(rng, storage) if is_bomb else rng.choice(BYTES)(rng, data[24:end])
    return assemble(frame, data[end:-32])


RESEALED = [of_header, of_header, of_stream, of_stream, of_header_text, of_header_frame, of_frame]


def mutated(rng, encoded: Encoded, storage):
    """Every second mutation has the right checksum, so that what comes after it is tried."""
    if rng.random() < 0.5:
        data = rng.choice(BYTES)(rng, encoded.data)
        return rng.choice(BYTES)(rng, data) if rng.random() < 0.2 else data
    return rng.choice(RESEALED)(rng, encoded.data, storage)


def assert_whole(found):
    assert isinstance(found.metadata, dict)
    for tensor in found.tensors.values():
        if isinstance(tensor, Quantized):
            codes, scales = tensor.codes, tensor.scales
            assert (codes.dtype, codes.ndim, scales.dtype) == (np.int8, 2, np.float16)
            assert tensor.q_min in (-tensor.q_max, -tensor.q_max - 1)
            assert tensor.q_min <= codes.min() and codes.max() <= tensor.q_max
            assert scales.shape == codes.shape[:1]
        else:
            assert tensor.dtype in (np.float16, np.float32)
        weights = dequantize(tensor)
        assert weights.shape == tensor.shape and np.isfinite(weights).all()


def fuzz(storage, mutations, seed):
    """How often each kind of outcome was seen."""
    rng = random.Random(seed)
    encoded = artifact(storage)
    seen: Counter[str] = Counter()
    for i in range(mutations):
        data = mutated(rng, encoded, storage)
        tracemalloc.start()
        try:
            found = decode(data, memory_limit=MEMORY_LIMIT)
        except ArtifactError as error:
            line = str(error)
            assert line and "\n" not in line and len(line) < 600, (i, line)
            seen[line.split(":")[0].split(" 0x")[0][:24]] += 1
        except BaseException as error:
            raise AssertionError(f"mutation {i} of {storage} with seed {seed}") from error
        else:
            assert_whole(found)
            seen["decoded"] += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_LIMIT, (i, peak)
    return seen


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_some_mutations(storage):
    seen = fuzz(storage, 100, seed=0)
    assert sum(seen.values()) == 100


@pytest.mark.full
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_ten_thousand_mutations(storage):
    seen = fuzz(storage, 2_000, seed=1)
    assert sum(seen.values()) == 2_000
    assert seen["decoded"] > 20 and seen["header"] > 100 and seen["damaged"] > 100
    assert seen["a/up"] + seen["a/key"] + seen["b/table"] > 100 and seen["scales"] > 10
