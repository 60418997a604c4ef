"""Kinds of tokenizers: bytes of any document by each library's own decoding, and refusals."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors

from sngpt_jax.data.tokenizer import load_tokenizer, tokenizer_json
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from tests.data.conftest import refuses
from tests.fuzz import byte_level

UNKNOWN = " \u2047 "  # what SentencePiece decodes an unknown token to
WORDS = ["the lot of the words", "and then a dog, 12 cats", "\u00e9t\u00e9 na\u00efve", "x = y\n"]
LINES = [f"{a} {b}".strip() for a in WORDS for b in WORDS] * 4
PIECES = [
    "the",
    " ",
    "  ",
    "▁",
    "\u2585",
    "\r\n",
    "\0",
    "\ud800",
    "e\u0301",
    "é",
    "日",
    "12",
    "ﬁ",
    "İ",
]
TEXTS = st.lists(
    st.sampled_from(PIECES) | st.characters(exclude_categories=(), exclude_characters="\u2047")
).map("".join)
EXAMPLES = ["", " ", "▁", "\r\n", "日 the", "the 日", " the  dog ", "the dog\u0301 " * 500]

NO_SPACES = [line.replace(" ", "") for line in LINES]

KEPT = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
}
FALLBACK = {"byte_fallback": True, "vocab_size": 320}
PIECE_MODELS = {
    "BPE": KEPT,
    "BPE with bytes": KEPT | FALLBACK,
    "BPE with bytes, NFKC": FALLBACK,
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": KEPT | FALLBACK | {"model_type": "unigram"},
    "no space": KEPT | FALLBACK | {"lines": NO_SPACES},
    "no space, unigram": KEPT | FALLBACK | {"lines": NO_SPACES, "model_type": "unigram"},
    "no space, NFKC": FALLBACK | {"lines": NO_SPACES, "add_dummy_prefix": False},
    "char": KEPT | {"model_type": "char"},
    "char with bytes": KEPT | FALLBACK | {"model_type": "char"},
    "word": {"model_type": "word"},
    "word with bytes": KEPT | FALLBACK | {"model_type": "word"},
    "space after the word": KEPT | {"treat_whitespace_as_suffix": True},
    "space after the word, NFKC": FALLBACK
    | {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
    "symbols": KEPT | {"user_defined_symbols": ["the", "\n", "<mark>"]},
    "symbols with spaces": KEPT | FALLBACK | {"user_defined_symbols": ["a dog", "  "]},
    "symbols, dummy prefix": FALLBACK | {"user_defined_symbols": ["the", "<mark>"]},
}
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUT = [pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w+"), "isolated"), pre_tokenizers.Digits(True)]
JSONS = {
    "plain": {},
    "NFC": {"normalizer": normalizers.NFC()},
    "NFD and lower case": {
        "normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    },
    "NFKC": {"normalizer": normalizers.NFKC()},
    "cut, with a template": {
        "pre_tokenizer": pre_tokenizers.Sequence([*CUT, LEVEL]),
        "post_processor": processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        ),
    },
}


def clean(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def piece_model(lines=LINES, **options):
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 60, "hard_vocab_limit": False}
    settings |= {"minloglevel": 2, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def check(tokenizer, kept, normalized):
    """Checks every text; `kept` and `normalized` are other libraries' functions of the text."""

    @settings(
        max_examples=60,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(TEXTS)
    def one(text):
        source = clean(text)
        document, size, back = tokenizer.encode_document(text), len(source.encode()), kept(source)
        text_bytes = size if back == source else min(size, len(back.encode()))
        expected = (len(normalized(source).encode()), text_bytes, size, int(back != source))
        assert document.bytes == expected
        assert document.lossy == (back != source)
        tokens, table = document.tokens, tokenizer.token_bytes()
        total = table.count(tokens[:-1], tokens[1:]).sum() + document.corrections[:, 1:].sum(axis=0)
        assert tuple(total[:3]) == expected[:3]
        if back == source:
            assert tokenizer.decode(tokens) == source

    for text in EXAMPLES:
        one = example(text)(one)
    one()


@pytest.mark.parametrize("name", PIECE_MODELS)
def test_bytes_of_a_sentencepiece_model(name, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(piece_model(**PIECE_MODELS[name]))
    of_pieces(path)


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_bytes_of_a_learned_model(normalization, tmp_path):
    path = tmp_path / "t.model"
    train_sentencepiece(LINES, path, vocab_size=300, normalization=normalization)
    of_pieces(path)


def of_pieces(path):
    tokenizer = load_tokenizer(path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    dummy = sp.normalize("a").startswith("▁")
    space_is_bytes = sp.piece_to_id("▁") == sp.unk_id()

    def kept(text):
        back = sp.decode(tokenizer.encode(text).tolist()).replace(UNKNOWN, "")
        return back.replace("▁", " ") if space_is_bytes else back

    def normalized(text):
        # a literal ▁ that the library gives back was not read as a space
        parts = text.split("▁") if kept("▁") == "▁" else [text]
        return "▁".join(sp.normalize(part).replace("▁", " ")[dummy:] for part in parts)

    check(tokenizer, kept, normalized)


@pytest.mark.parametrize("name", ["no space", "no space, unigram"])
def test_a_space_of_three_byte_tokens_is_one_byte(name, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(piece_model(**PIECE_MODELS[name]))
    document = load_tokenizer(path).encode_document("the dog")
    assert len(document.tokens) > 3 and document.bytes == (7, 7, 7, 0)
    assert load_tokenizer(path).decode(document.tokens) == "the dog"


@pytest.mark.parametrize("name", JSONS)
def test_bytes_of_a_tokenizer_json(name, tmp_path):
    tok = byte_level(LINES, 300)
    for part, value in JSONS[name].items():
        setattr(tok, part, value)
    path = tmp_path / "tokenizer.json"
    tok.save(str(path))
    normalizer = tok.normalizer or normalizers.Sequence([])
    tok.encode_special_tokens = True

    def kept(text):
        return tok.decode(tok.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)

    check(load_tokenizer(path), kept, normalizer.normalize_str)


# ---------------------------------------- refusals


def test_a_space_after_the_word_with_a_dummy_prefix_is_refused(tmp_path):
    path = tmp_path / "t.model"
    options = KEPT | {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}
    path.write_bytes(piece_model(**options))
    refuses(f"{path}.*before the word", load_tokenizer, path)


def test_spaces_that_are_not_escaped_are_refused(tmp_path):
    path, whole = tmp_path / "t.model", piece_model(**KEPT)
    start = whole.index(b"\n\x08identity")  # the normalizer's settings, after their length
    end = start + whole[start - 1]
    settings = whole[start:end] + b"\x28\x00"  # escape_whitespaces = false
    path.write_bytes(whole[: start - 1] + bytes([len(settings)]) + settings + whole[end:])
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).normalize("a b") == "a b"
    refuses(f"{path}.*does not write a space", load_tokenizer, path)


def parts(**values):
    spec = json.loads(byte_level(LINES, 270).to_str())
    for where, value in values.items():
        *folders, last = where.split("__")
        inner = spec
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    return spec


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
TOKEN = {"id": 0, "content": "<|endoftext|>", "special": True}
BAD = [
    ({"normalizer": REPLACE}, "normalizer 'Replace'"),
    ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, "normalizer 'Prepend'"),
    ({"normalizer": {"type": "ByteLevel"}}, "normalizer 'ByteLevel'"),
    ({"normalizer": {"type": "Strip"}}, "normalizer 'Strip'"),
    ({"normalizer": {"type": "StripAccents"}}, "normalizer 'StripAccents'"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, REPLACE]}}, "'Replace'"),
    ({"normalizer": {"type": "NFC", "form": 1}}, "unknown key 'form'"),
    ({"normalizer": 7}, "normalizer without a type"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer 'Metaspace'"),
    ({"decoder": {"type": "Strip"}}, "decoder 'Strip'"),
    ({"model__type": "Unigram"}, "model is 'Unigram'"),
    ({"model__dropout": 0.5}, "sets dropout"),
    ({"model__vocab": {"a": "b"}}, "expected int"),
    ({"model__vocab": {"a": 1, "b": 1}}, "ids must be different"),
    ({"model__vocab": {"a": -1}}, "none negative"),
    ({"model__vocab": []}, "expected an object"),
    ({"model__merges": [["a"]]}, r"merges\[0\]"),
    ({"model__merges": ["a b c"]}, r"merges\[0\]"),
    ({"model__merges": [["a", "no such piece"]]}, r"merges\[0\]"),
    ({"model__merges": 3}, r"merges\[0\]"),
    ({"added_tokens": [TOKEN, TOKEN]}, "the same id"),
    ({"added_tokens": [TOKEN | {"id": 9}]}, "another id"),
    ({"added_tokens": [TOKEN | {"content": "<s>"}]}, "another id"),
    ({"added_tokens": [TOKEN, TOKEN | {"id": 999, "content": "<s>"}]}, "do not follow"),
    ({"added_tokens": [TOKEN | {"special": 1}]}, "expected bool"),
    ({"added_tokens": [{"content": "<s>"}]}, "missing id"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_part_that_is_not_known_is_one_line(values, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parts(**values)), encoding="utf-8")
    refuses(f"{path}.*{message}", load_tokenizer, path)


def test_the_library_gets_no_part_that_failed(tmp_path, monkeypatch):
    spec = parts(normalizer=REPLACE)
    monkeypatch.setattr(tokenizers, "Tokenizer", None)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    refuses("normalizer 'Replace'", load_tokenizer, path)


def test_a_tokenizer_that_drops_text_is_refused(tmp_path):
    (tmp_path / "rules.tsv").write_text("E9\t\n")  # é becomes nothing
    path = tmp_path / "t.model"
    path.write_bytes(piece_model(normalization_rule_tsv=str(tmp_path / "rules.tsv")))
    refuses(f"{path}: the tokenizer drops text: ", load_tokenizer, path)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "was ended by signal 15"),
        ("raise SystemExit('no such\\npattern')", "failed: pattern"),
        ("import time; time.sleep(9)", "takes longer than 0.5 s"),
    ],
)
def test_a_trial_that_does_not_end_well_is_one_line(program, problem, tmp_path):
    path = tmp_path / "tokenizer.json"
    seconds = 0.5 if "sleep" in program else 60
    refuses(f"{path}.*{problem}", tokenizer_json.try_in_child, path, "{}", program, seconds)


def test_a_damaged_regular_expression_is_one_line(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}
    level = parts()["pre_tokenizer"]
    path = tmp_path / "tokenizer.json"
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    path.write_text(json.dumps(parts(pre_tokenizer=steps)), encoding="utf-8")
    refuses(f"{path}: not usable: .*failed", load_tokenizer, path)
