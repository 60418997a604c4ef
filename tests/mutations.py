"""Ways to damage a file, by accident and on purpose."""

import copy
import json
import random
import re

INTEGERS = (0, 1, -1, 2, 3, 9, 255, 256, 1000, 65_536, 2**53 + 1, 10**30, -(2**63), 10**4000)
POWERS = (2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64)
FLOATS = (0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"))
TEXTS_OF_NOTE = ("", "x", "..", "a/b", "\0", "\ud800", "é", "x" * 10_000)
WORDS = ("rans", "zstd", "lzma", "grid", "float16", "float32")
HOLDERS = ([], {}, [[]], [1], [2, 3], [2**40] * 16)
EXTREMES = [*INTEGERS, *POWERS, *FLOATS, *TEXTS_OF_NOTE, *WORDS, *HOLDERS, True, False, None]


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def place(rng, data):
    return rng.randrange(len(data) + 1)


def truncated(rng, data):
    return data[: place(rng, data)]


def inserted(rng, data):
    at = place(rng, data)
    piece = rng.choice([rng.randbytes(rng.randrange(1, 9)), bytes(rng.randrange(1, 40))])
    return data[:at] + piece + data[at:]


def deleted(rng, data):
    at = place(rng, data)
    return data[:at] + data[at + rng.randrange(1, 40) :]


def spliced(rng, data):
    """A piece of it copied over another place."""
    start, at = place(rng, data), place(rng, data)
    piece = data[start : start + rng.randrange(1, 200)]
    return data[:at] + piece + data[at + len(piece) :]


def overwritten(rng, data):
    at, length = place(rng, data), rng.choice([1, 2, 4, 8])
    piece = rng.choice([b"\xff", b"\0", b"\x7f"]) * length
    return (data[:at] + piece + data[at + length :])[: len(data)]


BYTES = [flipped, truncated, inserted, deleted, spliced, overwritten]


def places(value):
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield value, key
        yield from places(inner)


def edit(rng, header):
    """One change to a JSON value, in place."""
    container, key = rng.choice(list(places(header)))
    other, other_key = rng.choice(list(places(header)))
    kind = rng.randrange(6)
    if kind <= 2:
        container[key] = copy.deepcopy(rng.choice(EXTREMES))
    elif kind == 3:
        del container[key]
    elif kind == 4:
        container[key] = copy.deepcopy(other[other_key])
    elif isinstance(container[key], int):
        container[key] += rng.choice([-8, -4, -1, 1, 4, 8])
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        container["more"] = 0


# ---------------------------------------- JSON


def of_json(rng: random.Random, text: bytes) -> bytes:
    """JSON with one to three values changed, as text no library writes, or not as text at all."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(BYTES)(rng, text)
    if kind < 0.3:
        return rng.choice(TEXTS)(rng, text)
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if next(places(value), None):
            edit(rng, value)
    return json.dumps(value).encode("utf-8")


def number_replaced(rng: random.Random, text: bytes) -> bytes:
    """One number by what JSON readers differ on."""
    numbers = list(re.finditer(rb"(?<=[ \[:])-?\d[\d.e+-]*", text))
    if not numbers:
        return text
    found = rng.choice(numbers)
    others = b"1e999 -1e999 NaN -Infinity 0x10 01 1_0".split()
    other = rng.choice([*others, b"9" * 5000, "٣".encode()])
    return text[: found.start()] + other + text[found.end() :]


def key_doubled(rng: random.Random, text: bytes) -> bytes:
    pairs = list(re.finditer(rb'"\w+": (?=[-"\dtfn])[^,}\]]+,', text))
    if not pairs:
        return text
    found = rng.choice(pairs)
    return text[: found.end()] + found[0] + text[found.end() :]


def nested(rng: random.Random, text: bytes) -> bytes:
    depth = rng.choice([10, 63, 64, 65, 900, 2_000, 200_000])
    lists, objects = b"[" * depth, b'{"x":' * depth
    return rng.choice([lists + text + b"]" * depth, objects + text + b"}" * depth, lists])


def recoded(rng: random.Random, text: bytes) -> bytes:
    others = [text.decode().encode(name) for name in ("utf-16", "utf-32", "utf-8-sig")]
    return rng.choice([*others, text.replace(b"a", b"\xe9"), b""])


TEXTS = [number_replaced, key_doubled, nested, recoded]
