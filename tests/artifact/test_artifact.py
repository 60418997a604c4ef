"""The artifact's layout against struct, zstd and JSON by hand, and everything false that a file can
claim.
"""

import hashlib
import json
import lzma
import struct
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from sngpt_jax.artifact import parallel, sngpt_file
from sngpt_jax.artifact.quantize import Quantized, dequantize
from sngpt_jax.artifact.sngpt_file import ArtifactError, Storage, decode, encode, read
from tests.artifact.by_hand import MAGIC, STORAGES, as_text, assemble, quantized, sealed, split

METADATA = {"config": {"name": "tiny", "lr": 0.1}, "tokenizer": None, "step": 7}


def tensors():
    rng = np.random.default_rng(1)
    return {
        "blocks/0/mlp/up": quantized(24, 16, 5),
        "blocks/0/gain": np.float32(rng.standard_normal(8)),
        "blocks/0/attn/key": quantized(7, 9, 6, full=True, seed=2),
        "embed/table": quantized(11, 5, 8, transposed=False, seed=3),
        "bigram/table": quantized(6, 3, 2, full=True, transposed=False, seed=4),
        "skips": rng.standard_normal((2, 3)).astype(np.float16),
        "scale": np.array(0.05, np.float32),
        "late/key": rng.standard_normal((4, 5)).astype(np.float16),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        pairs = [(found[name], tensor)]
        if isinstance(tensor, Quantized):
            x = found[name]
            grids = [(x.bits, x.q_min, x.transposed) for x in (found[name], tensor)]
            assert grids[0] == grids[1]
            pairs = [(x.codes, tensor.codes), (x.scales, tensor.scales)]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(
    "chosen", [None, ["blocks/0/gain"], ["late/key"], ["bigram/table"], []], ids=str
)
def test_tensors_come_back(storage, chosen):
    expected = tensors() if chosen is None else {name: tensors()[name] for name in chosen}
    encoded = encode(METADATA, expected, storage)
    artifact = decode(encoded.data)
    assert_same(artifact.tensors, expected)
    assert (artifact.metadata, artifact.storage) == (METADATA, storage)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_bytes_are_accounted_for_and_do_not_depend_on_threads(storage, monkeypatch):
    encoded = encode(METADATA, tensors(), storage)
    assert list(encoded.tensor_bytes) == list(tensors())
    assert encoded.header_bytes + sum(encoded.tensor_bytes.values()) == len(encoded.data)
    assert encoded.tensor_bytes["blocks/0/mlp/up"] > encoded.tensor_bytes["blocks/0/attn/key"] > 0
    for threads in (1, 5):
        monkeypatch.setattr(parallel.os, "cpu_count", lambda threads=threads: threads)
        assert encode(METADATA, tensors(), storage).data == encoded.data
        assert_same(decode(encoded.data).tensors, tensors())


def test_layout():
    data = encode(METADATA, tensors(), Storage(packed=True, codec="lzma", level=1)).data
    magic, version, header_length, payload_length = struct.unpack("<8sIIQ", data[:24])
    assert (magic, version) == (MAGIC, 2)
    assert len(data) == 24 + header_length + payload_length + 32
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    header = json.loads(zstandard.ZstdDecompressor().decompress(data[24 : 24 + header_length]))
    assert header["metadata"] == METADATA
    table = header["table"]
    assert table["storage"] == {"packed": True, "codec": "lzma", "level": 1}
    grid = {"bits": 5, "q_min": -15, "transposed": True}
    grid["length"] = table["tensors"][0]["grid"]["length"]
    shape = [16, 24]  # of the matrix; its rows are the codes' columns
    first = {"name": "blocks/0/mlp/up", "shape": shape, "kind": "grid", "grid": grid}
    assert table["tensors"][0] == first
    grids = [entry["grid"]["length"] for entry in table["tensors"] if entry["kind"] == "grid"]
    streams, position = [], 24 + header_length
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]
    for length in [*grids, table["scales"], table["float16"], table["float32"]]:
        stream, position = data[position : position + length], position + length
        streams.append(lzma.decompress(stream, lzma.FORMAT_RAW, filters=filters))
    assert position == len(data) - 32

    expected = tensors()
    mlp = expected["blocks/0/mlp/up"].codes.reshape(-1) + 15
    assert int.from_bytes(streams[0], "little") == sum(int(u) << (5 * i) for i, u in enumerate(mlp))
    assert streams[2] == expected["embed/table"].codes.tobytes()  # int8 is a byte each
    grids = [tensor for tensor in expected.values() if isinstance(tensor, Quantized)]
    scales = b"".join(grid.scales.tobytes() for grid in grids)
    assert streams[4] == scales[0::2] + scales[1::2]
    singles = np.append(expected["blocks/0/gain"], expected["scale"]).tobytes()
    assert streams[6] == b"".join(singles[i::4] for i in range(4))


def test_packed_codes_of_one_grid_share_a_stream():
    alike = {f"blocks/{i}/mlp/up": quantized(10 + i, 7, 5, seed=i) for i in range(3)}
    other = {"embed/table": quantized(11, 5, 8), "skips": quantized(3, 7, 5, full=True)}
    encoded = encode({}, {**alike, **other}, Storage(packed=True, codec="lzma", level=1))
    table = json.loads(split(encoded.data)[0])["table"]
    lengths = [entry["grid"]["length"] for entry in table["tensors"]]
    assert lengths[1:3] == [0, 0] and min(lengths[:1] + lengths[3:]) > 0
    assert_same(decode(encoded.data).tensors, {**alike, **other})
    # the tensors share the bytes by their sizes
    shares = [encoded.tensor_bytes[name] for name in alike]
    assert shares == sorted(shares) and sum(shares) > lengths[0]  # with the scales


def test_a_file_of_version_1_with_a_stream_per_packed_tensor_is_read():
    first, second = quantized(10, 8, 5), quantized(12, 8, 5, seed=1)
    storage = Storage(packed=True, codec="zstd", level=1)
    alone = [encode({}, {"a": tensor}, storage).data for tensor in (first, second)]
    headers = [json.loads(split(data)[0]) for data in alone]
    bodies = [split(data)[1] for data in alone]
    cuts = [header["table"]["tensors"][0]["grid"]["length"] for header in headers]
    scales = np.concatenate([first.scales, second.scales]).view(np.uint8).reshape(-1, 2)
    frame = zstandard.ZstdCompressor(level=1).compress(scales.T.tobytes())
    both = headers[0]
    both["table"]["tensors"].append(headers[1]["table"]["tensors"][0] | {"name": "b"})
    both["table"]["scales"] = len(frame)
    payload = b"".join(body[:cut] for body, cut in zip(bodies, cuts, strict=True)) + frame
    assert_same(decode(assemble(as_text(both), payload)).tensors, {"a": first, "b": second})


def test_zstd_keeps_the_smaller_of_two_levels():
    random = {"a": quantized(64, 500, 5), "b": np.zeros((64, 500), np.float16)}
    encoded = encode({}, random, Storage(packed=False, codec="zstd", level=22))
    assert sum(encoded.levels.values()) == 3 and set(encoded.levels) <= {1, 22}
    sizes = {
        level: len(zstandard.ZstdCompressor(level=level).compress(random["a"].codes.tobytes()))
        for level in (1, 22)
    }
    assert encoded.tensor_bytes["a"] <= min(sizes.values()) + 150


def test_the_decoder_imports_no_jax(tmp_path):
    path = tmp_path / "x.sngpt"
    path.write_bytes(encode(METADATA, tensors(), STORAGES[0]).data)
    code = (
        "import pathlib, sys; from sngpt_jax.artifact.sngpt_file import read;"
        " print(len(read(pathlib.Path(sys.argv[1])).tensors), 'jax' in sys.modules)"
    )
    said = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True)
    assert said.split() == [str(len(tensors())), "False"]


# ---------------------------------------------------------------------------- files that are none


def edited(data, **changes):
    """The artifact with values of its header replaced: `tensors__0__shape=[1]`."""
    text, payload = split(data)
    header = json.loads(text)
    for path, value in changes.items():
        *steps, last = path.split("__")
        place = header["table"]
        for step in steps:
            place = place[int(step) if step.isdecimal() else step]
        place[int(last) if last.isdecimal() else last] = value
    return assemble(as_text(header), payload)


GOOD = encode(METADATA, tensors(), STORAGES[0]).data


def test_what_the_editing_here_makes_is_an_artifact():
    assert assemble(*split(GOOD)) != GOOD  # another level of zstd
    assert_same(decode(assemble(*split(GOOD))).tensors, tensors())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an artifact: begins with b''"),
        (b"PK\x03\x04" * 30, "not an artifact"),
        (GOOD.replace(b"\r\n", b"\n", 1), "not an artifact"),
        (GOOD[:30], "truncated: 30 bytes"),
        (GOOD[:-1], "truncated: "),
        (GOOD[:-100], "truncated: "),
        (GOOD + b"\n", "continues after its end"),
        (GOOD[:8] + b"\3" + GOOD[9:], "an artifact of version 3, expected version 1 or 2"),
        (GOOD[:200] + bytes([GOOD[200] ^ 4]) + GOOD[201:], "damaged: its SHA-256"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "damaged: its SHA-256"),
        (GOOD[:12] + b"\xff\xff\xff\xff" + GOOD[16:], "truncated: "),
        (GOOD[:16] + b"\xff" * 8 + GOOD[24:], "truncated: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_one_clear_line(data, message, tmp_path):
    path = tmp_path / "x.sngpt"
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and message in line and "\n" not in line


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ArtifactError, match=f"{path}: cannot be read: "):
            read(path)


@contextmanager
def peak_below(limit):
    """The body allocates fewer bytes at a time than `limit`."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit


def needed_bytes(data, too_few):
    """The bytes that the refusal says decoding takes."""
    with pytest.raises(ArtifactError) as caught:
        decode(data, memory_limit=too_few)
    return int(str(caught.value).split()[1].replace(",", ""))


def refused(data, message, **limits):
    with pytest.raises(ArtifactError, match=message) as caught:
        decode(data, **limits)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors__0__name": "../x"}, "not a tensor's name"),
        ({"tensors__0__name": "a//b"}, "not a tensor's name"),
        ({"tensors__0__name": "a\n"}, "not a tensor's name"),
        ({"tensors__0__name": "x" * 101}, "not a tensor's name"),
        ({"tensors__0__name": "ё"}, "not a tensor's name"),
        ({"tensors__0__name": 1}, r"header.table.tensors\[0\].name: expected str, found 1"),
        ({"tensors__0__name": "skips"}, "'skips' names two tensors"),
        ({"tensors__0__shape": [16, 0]}, "expected at most 16 axes, each 1 to 2"),
        ({"tensors__0__shape": [16, -24]}, "expected at most 16 axes"),
        ({"tensors__0__shape": [2**62, 2**62]}, "expected at most 16 axes"),
        ({"tensors__0__shape": [2**63 - 1, 1]}, "expected at most 16 axes"),
        ({"tensors__5__shape": [1] * 17}, "expected at most 16 axes"),
        ({"tensors__0__shape": [16.0, 24]}, "expected int, found 16.0"),
        ({"tensors__0__shape": [True, 24]}, "expected int, found True"),
        ({"tensors__0__shape": "16"}, "expected a list"),
        ({"tensors__0__shape": [16, 24, 1]}, "a grid needs 2 axes"),
        ({"tensors__0__shape": [2**31, 2**31]}, "to decode, above the limit of 8,589,934,592"),
        ({"tensors__1__shape": [2**40] * 16}, "bytes to decode"),
        ({"tensors__0__kind": "float64"}, "of grid, float16, float32, found 'float64'"),
        ({"tensors__0__kind": "float16"}, "kind float16 with a grid"),
        ({"tensors__0__grid": None}, "kind grid without a grid"),
        ({"tensors__0__grid__bits": 1}, "2 to 8 bits, found 2 and 1"),
        ({"tensors__0__grid__bits": 9}, "2 to 8 bits, found 2 and 9"),
        ({"tensors__0__grid__bits": 10**4000}, "not an integer of 64 bits"),
        ({"tensors__0__grid__bits": True}, "expected int, found True"),
        ({"tensors__0__grid__q_min": -14}, "expected -15 or -16 as the least code of 5 bits"),
        ({"tensors__0__grid__transposed": 1}, "expected bool, found 1"),
        ({"tensors__0__grid__length": -1}, "do not fill the payload"),
        ({"tensors__0__grid__length": 0}, "has no stream"),
        ({"tensors__0__grid__length": 2**63 - 1}, "do not fill the payload"),
        ({"tensors__0__grid__offset": 0}, "unknown key 'offset'"),
        ({"scales": 0}, "do not fill the payload"),
        ({"float32": 2**63 - 1}, "do not fill the payload"),
        ({"float32": 2**63}, "not an integer of 64 bits"),
        ({"storage__level": 0}, "level 0 of rans, expected 1 to 22"),
        ({"storage__level": 23}, "level 23 of rans"),
        ({"storage__codec": "zip"}, "expected one of rans, zstd, lzma"),
        ({"storage__packed": True}, "the codec rans takes no packed codes"),
        ({"storage__packed": None}, "expected bool, found None"),
        ({"storage__codec": "zstd"}, "zstd"),
        ({"storage__codec": "lzma", "storage__level": 9}, "lzma"),
        ({"tensors": []}, "without a tensor|do not fill"),
        ({"tensors": {}}, "expected a list"),
        ({"storage": None}, "expected an object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_header_says_nothing_that_is_not_so(changes, message):
    refused(edited(GOOD, **changes), message)


def test_streams_lie_end_to_end():
    """Streams cannot overlap. A word moved from one to the next is damage in both."""
    header = json.loads(split(GOOD)[0])
    first, second = (header["table"]["tensors"][i]["grid"]["length"] for i in (0, 2))
    moved = {"tensors__0__grid__length": first + 4, "tensors__2__grid__length": second - 4}
    refused(edited(GOOD, **moved), "rans stream")
    refused(edited(GOOD, tensors__0__grid__length=first + 4), "do not fill the payload")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"step":7', '"step":7,"step":7', "the key 'step' is given twice"),
        ('"step":7', '"step": 7', "in another spelling than this program writes"),
        ('"step":7', '"step":NaN', "no finite number"),
        ('"step":7', '"step":1e999', "no finite number"),
        ('"step":7', '"step":' + "1" * 5000, "not an integer of 64 bits"),
        ('"step":7', '"step":' + "[" * 100_000 + "]" * 100_000, "levels deep"),
        ("tiny", "tïny", "in another spelling than this program writes"),
        ('"float32":', "", "header: "),
        ('{"metadata":{', '{"more":0,"metadata":{', "unknown key 'more'"),
        ('{"config":{"name":"tiny","lr":0.1},', '[{"lr":0},', "header: "),
        (None, "", "header: "),
        (None, "[]", "header: expected an object"),
        (None, '{"metadata":[],"table":{}}', "metadata: expected an object"),
    ],
    ids=range(13),
)
def test_a_header_is_canonical_json(old, new, message):
    text, payload = split(GOOD)
    changed = text.decode().replace(old, new) if old else new
    assert changed != text.decode()
    refused(assemble(changed.encode(), payload), message)


def test_a_header_that_is_a_bomb_or_too_long():
    text, payload = split(GOOD)
    bomb = assemble(b" " * 100_000_000, payload)
    costly = assemble(b"[" + b"{}," * 100_000 + b"{}]", payload)
    assert len(bomb) < 20_000 and len(costly) < 2_000
    with peak_below(200_000):
        refused(bomb, "header: 100,000,000 bytes of JSON, above the limit of 4,194,304")
        refused(costly, "bytes to decode, above the limit of 9", memory_limit=9_000_000)
    length = len(GOOD) - len(payload) - 56
    no_frame = MAGIC + struct.pack("<IIQ", 1, length, len(payload)) + bytes(length) + payload
    refused(sealed(no_frame), "header: no zstd frame")
    unstated = assemble(text, payload, write_content_size=False)
    refused(unstated, "header: the zstd frame does not state its size")


def test_the_memory_that_decoding_takes_is_bounded_by_what_is_said():
    """Some hundred bytes that would be 4 million weights."""
    zeros = Quantized(np.zeros((2000, 2000), np.int8), np.ones(2000, np.float16), 5, -15, False)
    for storage in STORAGES:
        data = encode({}, {"zeros": zeros}, storage).data
        needed = needed_bytes(data, 1_000_000)
        refused(data, "above the limit", memory_limit=needed - 1)
        with peak_below(needed):
            dequantize(decode(data, memory_limit=needed).tensors["zeros"])
        assert 16_000_000 < needed < 60_000_000


def test_the_memory_of_headers_and_of_many_small_tensors_is_bounded_too():
    one = Quantized(np.ones((1, 1), np.int8), np.ones(1, np.float16), 2, -1, False)
    many: dict = {f"{i}": one for i in range(400)}
    many |= {f"x{i}": np.ones((), np.float16) for i in range(400)}
    files = [encode({}, many, storage).data for storage in (STORAGES[0], STORAGES[3])]
    lists = [{"x": [unit] * 4_000} for unit in ({}, [0], {"": {}}, "aa")]
    keys = {f"{i}": 0 for i in range(4_000)}
    files += [encode(metadata, {}, STORAGES[0]).data for metadata in (*lists, keys)]
    for data in files:  # the header alone exceeds the limit
        with peak_below(needed_bytes(data, 20_000)):
            decode(data)


def test_a_file_above_the_limit_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large"
    head = sngpt_file.HEAD.pack(MAGIC, 2, 0, 2000 - sngpt_file.HEAD.size - sngpt_file.DIGEST)
    path.write_bytes(head.ljust(2000, b"\0"))
    monkeypatch.setattr(sngpt_file, "FILE_LIMIT", 1999)
    with pytest.raises(ArtifactError, match=f"{path}: 2,000 bytes; .* more than 1,999"):
        read(path)


# ---------------------------------------------------------------------------------- encoding


def test_what_could_not_be_decoded_is_not_encoded():
    good = tensors()["blocks/0/mlp/up"]
    bad_scales = np.where(np.arange(24) == 3, np.float16(np.inf), good.scales)
    cases = [
        ({"x": replace(good, scales=bad_scales)}, {}, "x: numbers that are not finite"),
        ({"x": np.array([1, np.nan], np.float32)}, {}, "x: numbers that are not finite"),
        ({"x": replace(good, codes=good.codes + np.int8(9))}, {}, "x: codes from .* -15 to 15"),
        ({"x": np.zeros(3)}, {}, "found 'float64'"),
        ({"x": np.zeros((0, 3), np.float16)}, {}, "each 1 to 2"),
        ({"a b": good}, {}, "not a tensor's name"),
        ({}, {"lr": np.inf}, "metadata: Out of range float"),
        ({}, {"text": "x" * 2**22}, "header: 4,194"),
    ]
    for bad, metadata, message in cases:
        for storage in STORAGES:
            with pytest.raises(ArtifactError, match=message):
                encode(metadata, bad, storage)
    with pytest.raises(ArtifactError, match="level 22 of lzma, expected 0 to 9"):
        encode({}, {}, Storage(False, "lzma", 22))
