"""Tokenizers: the bytes that tokens stand for, decoding, training, and refusals."""

import io
import itertools
import json
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.data import tokenizer as module
from sngpt_jax.data.corpus import documents
from sngpt_jax.data.tokenizer import TokenBytes, base, load_tokenizer, replace_surrogates
from sngpt_jax.data.tokenizer.learn import TRAINING_CHARS_PER_TOKEN, train_sentencepiece
from tests.data.conftest import refuses
from tests.fuzz import byte_level

# every character there is, surrogates too, and often those that the rules turn on
CHARACTERS = st.one_of(
    st.characters(exclude_categories=()),
    st.sampled_from(" \t\n\r▁\0\u3000\u2585\ufeffe\u0301ﬁ日本aeht<|>09"),
)
PIECES = ["  ", "the", "▁", " 日", "本", "\n    ", "<|endoftext|>"]
TEXTS = st.text(CHARACTERS) | st.lists(st.sampled_from(PIECES)).map("".join)
EXAMPLES = ["", " ", "▁", " ▁ the", "日本 the▁ 本", "the  the\n\n\treturn", "<|endoftext|><s>"]
EXAMPLES.append("\ud800 the")

DUMMY_PREFIX = ("llama", "t5", "dummy, spaces kept, without bytes")
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NFKC = {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False}
MODELS = {
    "identity": {},
    "nmt_nfkc": {},
    "challenge without bytes": NFKC | {"add_dummy_prefix": False},
    "spaces kept, without bytes": IDENTITY | {"add_dummy_prefix": False},
    "llama": IDENTITY | {"byte_fallback": True},
    "t5": NFKC,
    "runs folded, first space kept": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "dummy, spaces kept, without bytes": IDENTITY,
}
BYTE_LEVEL = ["byte level", "byte level NFC"]
SPELLING_ALL = ["identity", "nmt_nfkc", "llama", *BYTE_LEVEL]  # every character


def sentencepiece_model(texts, **options):
    model = io.BytesIO()
    base = {"model_type": "bpe", "vocab_size": 400, "minloglevel": 2}
    base |= {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **(base | options)
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def texts():
    return list(itertools.islice(documents("stdlib"), 12))


@pytest.fixture(scope="module")
def loaded(texts, tmp_path_factory):
    """Every kind of tokenizer by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "rules.tsv").write_text("20 20\t20\n")  # two spaces become one
    lines = [line for text in texts for line in text.splitlines() if line]
    found = {}
    for name, options in MODELS.items():
        path = folder / f"{name}.model"
        if not options:
            found[name] = train_sentencepiece(iter(texts), path, vocab_size=512, normalization=name)
            continue
        if name == "runs folded, first space kept":
            options = options | {"normalization_rule_tsv": str(folder / "rules.tsv")}
        path.write_bytes(sentencepiece_model(lines, **options))
        found[name] = load_tokenizer(path)
    for name, normalizer in zip(BYTE_LEVEL, (None, tokenizers.normalizers.NFC()), strict=True):
        path = folder / f"{name}.json"
        tok = byte_level(texts, 400, normalizer)
        # whitespace as GPT-NeoX adds it
        tok.add_tokens([tokenizers.AddedToken("   ", normalized=True)])
        tok.save(str(path))
        found[name] = load_tokenizer(path)
    return found


def bytes_of(tokenizer, text):
    """The bytes that a document's tokens stand for."""
    return tokenizer.encode_document(text).bytes.golf


def normalizer_of(tokenizer, name):
    """A function from text to the text that its tokens stand for, by other libraries."""
    if name == "byte level NFC":
        return lambda text: tokenizers.normalizers.NFC().normalize_str(clean(text))
    if name in ("identity", "byte level"):
        return clean
    sp, skipped = processor(tokenizer), name in DUMMY_PREFIX
    return lambda text: sp.normalize(clean(text)).replace("▁", " ")[skipped:]


def clean(text):
    return "".join("\ufffd" if unicodedata.category(c) == "Cs" else c for c in text)


def processor(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))


# ---------------------------------------- bytes


@pytest.mark.parametrize("name", [*MODELS, *BYTE_LEVEL])
def test_bytes_of_any_document_equal_the_normalized_text(loaded, name):
    tokenizer = loaded[name]
    normalized = normalizer_of(tokenizer, name)

    @settings(max_examples=80, database=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def check(text):
        assert replace_surrogates(text) == clean(text)
        document = tokenizer.encode_document(text)
        tokens, extra = document.tokens, document.corrections
        assert tokens[0] == tokenizer.bos_id and tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens[1:], tokenizer.encode(text))
        assert bytes_of(tokenizer, text) == len(normalized(text).encode())
        assert np.all(np.diff(extra[:, 0]) > 0) and np.all(
            extra[:, 0] > (0 if len(tokens) > 1 else -1)
        )
        if name in SPELLING_ALL:
            assert tokenizer.decode(tokens) == normalized(text)

    for text in EXAMPLES:
        check = example(text)(check)
    check()


def test_nfkc_folds_whitespace_and_identity_keeps_it(loaded):
    text = " def f(x):\n\treturn  ﬁ\n"
    for name, expected in (("nmt_nfkc", "def f(x): return fi"), ("identity", text)):
        assert loaded[name].decode(loaded[name].encode(text)) == expected


@pytest.mark.parametrize("name", ["nmt_nfkc", "challenge without bytes", "t5"])
def test_table_is_the_challenges_rule(loaded, name):
    sp, table = processor(loaded[name]), loaded[name].token_bytes()
    assert table.base.dtype == np.int32
    assert len(table.base) == sp.vocab_size() == loaded[name].vocab_size
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i):
            expected = (0, False, True)
        elif sp.is_byte(i):
            expected = (1, False, False)
        else:
            expected = (len(piece.removeprefix("▁").encode()), piece.startswith("▁"), False)
        assert (table.base[i], table.leading_space[i], table.boundary[i]) == expected, piece


def test_every_space_is_its_own_byte_where_whitespace_is_kept(loaded):
    sp, table = processor(loaded["identity"]), loaded["identity"].token_bytes()
    assert not table.leading_space.any()
    for i in range(4 + 256, sp.vocab_size()):
        piece = sp.id_to_piece(i)
        assert table.base[i] == piece.count("▁") + len(piece.replace("▁", "").encode())
    assert any(sp.id_to_piece(i) == "▁" * 4 for i in range(512))  # indentation is learned


def test_corrections_for_unknown_text(loaded):
    tokenizer = loaded["challenge without bytes"]
    sp = processor(tokenizer)
    unknown, space, the = sp.unk_id(), sp.piece_to_id("▁"), sp.piece_to_id("▁the")
    document = tokenizer.encode_document("日本 the 日")
    assert document.tokens.tolist() == [1, unknown, the, space, unknown]
    # the run of two; the space after it; the last one, and the source's bytes that are not spelled
    assert document.corrections.tolist() == [[1, 6, 0, 0, 0], [2, 1, 1, 1, 0], [4, 3, 0, 9, 1]]
    assert document.bytes == (14, 5, 14, 1) and "became ' the '" in document.example
    assert tokenizer.encode_document("the lot of the").corrections.shape == (0, 5)
    assert not len(loaded["identity"].encode_document(" 日本 ▁ \0").corrections)


def test_count_by_hand():
    table = TokenBytes(np.array([0, 2, 3], np.int32), np.arange(3) == 1, np.arange(3) == 0)
    bytes_ = table.count(np.array([0, 1, 2, 1]), np.array([1, 1, 2, 0]))
    assert bytes_.tolist() == [2, 3, 3, 0] and bytes_.dtype == np.int64


# ---------------------------------------- training


def test_training_settings_and_determinism(loaded, texts, tmp_path):
    for normalization in ("identity", "nmt_nfkc"):
        path = tmp_path / "deep" / "again.model"
        again = train_sentencepiece(iter(texts), path, vocab_size=512, normalization=normalization)
        assert again.sha256 == loaded[normalization].sha256
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["again.model"]
        sp = processor(again)
        assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
        assert (again.vocab_size, again.bos_id) == (512, 1)
        assert sum(sp.is_byte(i) for i in range(512)) == 256
        pieces = [sp.id_to_piece(i).lstrip("▁") for i in range(4 + 256, 512)]
        assert not any(len(piece) > 1 and re.search(r"\d", piece) for piece in pieces)


def test_training_reads_a_bounded_prefix_of_long_lines(tmp_path):
    read = []

    def stream():
        for i in itertools.count():
            read.append(i)
            # one line of more than 200,000
            yield "".join(f"{'ab' * (j % 7)}c{'d' * (j % 5)} " for j in range(i, i + 20_000))

    tokenizer = train_sentencepiece(
        stream(), tmp_path / "t.model", vocab_size=290, normalization="identity"
    )
    assert tokenizer.vocab_size == 290
    assert len(read) <= 290 * TRAINING_CHARS_PER_TOKEN // 200_000 + 1


def test_training_reads_text_that_holds_reserved_characters(tmp_path):
    texts = [f"some words {reserved} and more words" for reserved in "\u2585\0\ud800"] * 9
    assert train_sentencepiece(
        texts, tmp_path / "t.model", vocab_size=280, normalization="identity"
    )


@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [([], 512), (["hello world"], 512), (["hello world"], 100), (["\0"], 300), (["a"], 70_000)],
)
def test_text_that_cannot_make_the_vocabulary_is_one_line(tmp_path, texts, vocab_size):
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match=f"of {vocab_size} tokens") as error:
        train_sentencepiece(texts, path, vocab_size=vocab_size, normalization="identity")
    assert "\n" not in str(error.value) and "src/" not in str(error.value)
    assert not path.exists()


# ---------------------------------------- byte-level BPE


def test_byte_level_agrees_with_its_library(loaded, texts):
    tokenizer = loaded["byte level"]
    tok = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    for text in texts[:4]:
        assert tokenizer.encode(text).tolist() == tok.encode(text).ids
        assert tok.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.bos_id == tok.token_to_id("<|endoftext|>")


def test_added_tokens_may_also_stand_in_the_vocabulary(loaded, tmp_path):
    spec = json.loads(loaded["byte level"].path.read_text(encoding="utf-8"))
    spec["model"]["vocab"]["   "] = spec["added_tokens"][-1]["id"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.encode("a   b")) == 3 and bytes_of(tokenizer, "a   b") == 5


def test_special_tokens_in_text_are_text(loaded):
    for tokenizer in loaded.values():
        tokens = tokenizer.encode("<|endoftext|><s></s><unk>")
        assert tokenizer.bos_id not in tokens


def test_bytes_that_are_not_utf8_decode(loaded):
    for name in ("identity", "byte level"):
        tokens = loaded[name].encode("é")
        assert loaded[name].decode(tokens[:1]) == "\ufffd"
        assert loaded[name].decode([loaded[name].bos_id, *tokens]) == "é"


# ---------------------------------------- refusals


def refused(path, match):
    refuses(f"{path}.*{match}", load_tokenizer, path)


def test_files_that_are_no_tokenizer(tmp_path, loaded):
    refused(tmp_path / "absent.model", "No such file")
    refused(tmp_path / "a.bin", r"expected a SentencePiece \.model")
    whole, path = loaded["identity"].path.read_bytes(), tmp_path / "t.model"
    no_text = whole.replace(b"<s>", b"\xffs>", 1)  # a piece
    for data in (b"", b"garbage" * 9, whole[:5000], no_text):
        path.write_bytes(data)
        refused(path, "not a SentencePiece model")
    path = tmp_path / "t.json"
    for data in (b"", b'{"model": 3}', b"\xff\xfe"):
        path.write_bytes(data)
        refused(path, "not a tokenizer.json")


def test_sentencepiece_models_that_do_not_serve(tmp_path, texts):
    lines = [line for line in texts[0].splitlines() if line]
    path = tmp_path / "t.model"
    suffix = {"treat_whitespace_as_suffix": True}
    for options, message in (({"bos_id": -1}, "no BOS"), (suffix, "before the word")):
        path.write_bytes(sentencepiece_model(lines, vocab_size=300, **options))
        refused(path, message)


def changed(spec, **values):
    """A copy of `spec` with values set at dotted paths."""
    spec = json.loads(json.dumps(spec))
    for where, value in values.items():
        *folders, last = where.split("__")
        inner = spec
        for folder in folders:
            inner = inner[int(folder) if folder.isdigit() else folder]
        inner[last] = value
    return spec


def test_tokenizer_jsons_that_are_not_byte_level_bpe(tmp_path, texts):
    spec = json.loads(byte_level(texts[:2], 400).to_str())
    path = tmp_path / "tokenizer.json"
    level = spec["pre_tokenizer"]
    strip = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    added = spec["added_tokens"][0]
    extra = {**added, "id": 400, "content": "mark", "special": False, "lstrip": True}
    unnormalized = extra | {"lstrip": False, "normalized": False}
    other = added | {"content": "<|im_end|>", "id": 400}
    vocab = spec["model"]["vocab"]
    lacking = {piece: i for piece, i in vocab.items() if piece != "Ā"}

    def sequence(*steps):
        return {"type": "Sequence", "pretokenizers": steps}

    cases = [
        (changed(spec, pre_tokenizer=None), "ByteLevel"),
        (changed(spec, pre_tokenizer=level | {"add_prefix_space": True}), "add_prefix_space"),
        (changed(spec, pre_tokenizer=sequence(strip, level)), "expected one of Isolated"),
        (changed(spec, pre_tokenizer=sequence({"type": "WhitespaceSplit"}, level)), "Whitesp"),
        (changed(spec, pre_tokenizer=sequence()), "ByteLevel"),
        (changed(spec, model__end_of_word_suffix="s", model__merges=[]), "end_of_word_suffix"),
        (changed(spec, model__vocab=lacking), "no token for byte 0x00"),
        (changed(spec, model__vocab=vocab | {"日本": 400}), "byte alphabet"),
        (changed(spec, model={"type": "WordLevel", "vocab": vocab, "unk_token": "a"}), "WordLevel"),
        (changed(spec, added_tokens=[added, extra]), "'mark'"),
        (changed(spec, normalizer={"type": "NFC"}, added_tokens=[added, unnormalized]), "'mark'"),
        (changed(spec, added_tokens=[other]), r"looked for <\|endoftext\|>"),
    ]
    for bad, match in cases:
        path.write_text(json.dumps(bad), encoding="utf-8")
        refused(path, match)


def test_a_vocabulary_beyond_16_bits_is_refused(loaded, monkeypatch):
    assert base.MAX_VOCAB == 2**16  # of the shards' uint16
    for name in ("identity", "byte level"):
        path, size = loaded[name].path, loaded[name].vocab_size
        monkeypatch.setattr(base, "MAX_VOCAB", size)
        assert load_tokenizer(path).vocab_size == size
        monkeypatch.setattr(base, "MAX_VOCAB", size - 1)
        refused(path, f"vocabulary of {size} tokens")


def test_what_a_file_claims_is_not_made(tmp_path, loaded):
    """tokenizers lists every id up to the largest: 8 GB and a minute for 2^31."""
    spec = json.loads(loaded["byte level"].path.read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    vocab = spec["model"]["vocab"]
    for bad in (
        changed(spec, model__vocab=vocab | {"zzz": 2**31 - 1}),
        changed(spec, added_tokens__0__id=2**31 - 1),
    ):
        path.write_text(json.dumps(bad), encoding="utf-8")
        refused(path, "a vocabulary of 2147483648 tokens")
    with open(path, "wb") as file:
        file.truncate(module.MAX_BYTES + 1)
    refused(path, "no file of its kind has more than")
