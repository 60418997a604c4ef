#!/usr/bin/env bash
# sentencepiece: training ignores every sentence that contains the character U+2585.
#
# One would guess: a tokenizer with byte_fallback can be trained on any text. A rare character is,
# at worst, split into bytes.
# What happens: the trainer reserves U+2585, a block character of charts and progress bars, as its
# internal mark for unknown text. It skips the whole sentence. Only log level INFO reports this, so
# minloglevel=1 hides it. Training succeeds, and the model encodes the character without complaint.
# Why it matters: logs, notebooks and terminal output contain this character. The vocabulary lacks
# the words of all these sentences. Replacing the character before training avoids the loss.
# Seen with: sentencepiece 0.2.3, Python 3.11.
#
# Output:
#   sentencepiece 0.2.3
#   3,000 of 5,000 lines have U+0023: 2 pieces: _wizard _xylophone
#   3,000 of 5,000 lines have U+2584: 2 pieces: _wizard _xylophone
#   3,000 of 5,000 lines have U+2585: 15 pieces: _ <0x77> <0x69> <0x7A> a r d _ <0x78> <0x79> lo
#       <0x70> h on e

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3
cd "$work"
unset PYTHONPATH

"$work/venv/bin/python" - <<'PY'
import io
import sys

import sentencepiece

print("sentencepiece", sentencepiece.__version__)
common = [f"the cat number {i} sat on a mat and looked at {i * 7919 % 1000}" for i in range(2000)]


def pieces(mark):
    """The pieces of two words, after training on lines that hold them beside `mark`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(common + [f"wizard xylophone {mark} zebra"] * 3000),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor.encode("wizard xylophone", out_type=str)


counts = {}
for mark in ("#", "\u2584", "\u2585"):
    found = pieces(mark)
    counts[mark] = len(found)
    written = " ".join(found).replace("\u2581", "_")
    print(f"3,000 of 5,000 lines have U+{ord(mark):04X}: {len(found)} pieces: {written}")
if counts["#"] != 2 or counts["\u2584"] != 2:
    sys.exit("the behaviour changed: training ignores lines with U+0023 or U+2584")
if counts["\u2585"] == 2:
    sys.exit("the behaviour changed: training uses lines with U+2585")
PY
