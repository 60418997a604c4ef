"""The bytes of a stream of tokens, counted right and under each known mistake.

A mistake is a wrong table of bytes by token. The tables are made from the pieces of the tokenizer,
and the same function counts with each of them.
"""

from dataclasses import replace

import numpy as np
import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.shards import TokenStream
from sngpt_jax.data.tokenizer import NO_CORRECTIONS, TokenBytes, Tokenizer
from sngpt_jax.evaluation.audit.claim import float32_sums
from sngpt_jax.evaluation.audit.published import Count, Mistake
from sngpt_jax.evaluation.windows import Windows

_SPACE = "▁"  # U+2581, SentencePiece's sign for a space
_PRIVATE = range(0xE000, 0xF900)  # characters that Unicode leaves to private use

_REPLACED = "a token that is one byte counts the 3 bytes of U+FFFD, which stands for invalid bytes"

Tables = dict[str, TokenBytes]


def is_mark(piece: str) -> bool:
    """Whether a piece consists of private characters, which transforms put into a text."""
    return bool(piece) and all(ord(character) in _PRIVATE for character in piece)


def tables(tokenizer: Tokenizer) -> tuple[TokenBytes, Tables]:
    """The table in which marks of a transform stand for no bytes, and the table of each mistake."""
    right = tokenizer.token_bytes()
    if tokenizer.path.suffix == ".model":
        return _sentencepiece_tables(tokenizer, right)
    alone = [len(tokenizer.decode([i]).encode()) for i in range(tokenizer.vocab_size)]
    name = "a token counts the bytes of its own text, where U+FFFD stands for incomplete characters"
    return right, {name: replace(right, base=np.array(alone, np.int32))}


def _sentencepiece_tables(tokenizer: Tokenizer, right: TokenBytes) -> tuple[TokenBytes, Tables]:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    single = np.array([sp.is_byte(i) for i in range(len(pieces))])
    ordinary = ~(right.boundary | single)
    spelled = np.array([len(piece.encode()) for piece in pieces], np.int32)
    text = np.array([len(piece.replace(_SPACE, " ").encode()) for piece in pieces], np.int32)
    leading = np.array([piece.startswith(_SPACE) for piece in pieces]) & ordinary
    marks = np.array([is_mark(piece) for piece in pieces]) & ordinary
    high = np.array([single[i] and int(piece[1:-1], 16) >= 0x80 for i, piece in enumerate(pieces)])

    base = np.where(marks, 0, right.base)
    right = replace(right, base=base)
    with_space = np.where(ordinary & ~marks, text, base)
    twice = replace(right, base=with_space, leading_space=leading)
    no_space = np.zeros(len(pieces), bool)
    found = {
        "the space before a word is counted twice": twice,
        "the space before a word is counted twice, and byte tokens and control tokens count the"
        " bytes of their spelling": replace(twice, base=spelled - 2 * leading),
        "a token that is one byte counts the 6 bytes of its spelling": replace(
            right, base=np.where(single, spelled, base)
        ),
        _REPLACED: replace(right, base=np.where(high, 3, base)),
        "a space counts the 3 bytes of its sign ▁": replace(
            right, base=np.where(ordinary & ~marks, spelled, base), leading_space=no_space
        ),
        "the marks that a transform of the case puts into the text are counted": replace(
            right, base=np.where(marks, spelled, base)
        ),
    }
    return right, found


def without_corrections(stream: TokenStream) -> TokenStream:
    """The stream as a script sees it that has the tokens and a table alone."""
    bare = (replace(shard, extra=NO_CORRECTIONS) for shard in stream.shards)
    return replace(stream, shards=tuple(bare))


def right_counts(stream: TokenStream, table: TokenBytes, what: str, targets: int) -> list[Count]:
    """The counts of the first `targets` targets that are right by some rule, each number once: of
    the text, if the stream knows it; of the normalized text; and by the table alone.
    Raises `UserError` if there is no text.
    """
    found = stream.count_bytes(table, 1, targets + 1)
    alone = without_corrections(stream).count_bytes(table, 1, targets + 1)
    first = found.text if stream.text_known else found.golf
    if not first:
        raise UserError(f"{what}: its {targets:,} targets stand for no text; give other text")
    counts = {alone.golf: f"{what}, by the table of tokens alone, as the challenge's scripts count"}
    counts[found.golf] = f"{what}, as the challenge counts"
    if stream.text_known:
        counts[found.text] = what
    made = [Count(name, targets, size, len(stream)) for size, name in counts.items()]
    return sorted(made, key=lambda count: count.bytes != first)


def recount(
    stream: TokenStream, tokenizer: Tokenizer, what: str, targets: int, *, seq_len: int, stride: int
) -> tuple[list[Count], list[Mistake]]:
    """`right_counts`, and the mistakes that change the count; their ratios are to the first one."""
    right, mistaken = tables(tokenizer)
    counts = right_counts(stream, right, what, targets)
    first, bare, found = counts[0], without_corrections(stream), []
    for name, table in mistaken.items():
        total = bare.count_bytes(table, 1, targets + 1).golf
        if total not in (count.bytes for count in counts):
            ratio = total / first.bytes
            found.append(Mistake(name, ratio, ratio, "recomputed"))
    if targets >= seq_len > stride:
        spans = Windows(targets // seq_len * seq_len, seq_len, stride, "published").spans()
        again = [stream.count_bytes(right, start + 1, stop + 1) for start, stop in spans]
        size = sum(count.text if stream.text_known else count.golf for count in again)
        ratio = size / sum(stop - start for start, stop in spans) / first.per_token
        found.append(Mistake("the last targets are scored again", ratio, ratio, "recomputed"))
    return counts, [*found, *float32_sums(first, stride)]
