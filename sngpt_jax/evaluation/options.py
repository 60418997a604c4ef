"""The options of `evaluate` for a validation stream. Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

from sngpt_jax.config.options import OptionalInt
from sngpt_jax.evaluation.windows import Tail, Windows, sliding_windows, standard_windows

STRIDE = 64
MOST_MEMORY = 2**16  # GiB


@dataclass(frozen=True)
class StreamOptions:
    """Which targets of a stream are scored, in which windows, and with which n-gram cache."""

    # windows side by side (standard) or overlapping (sliding); none scores --tasks only
    mode: Literal["standard", "sliding", "none"] = "standard"
    # number of targets by which sliding windows advance; default: 64, or a window if that is less
    stride: OptionalInt = None
    # end of the stream in sliding windows: full scores every target once; published scores the last
    # targets several times, as submissions did
    tail: Tail = "full"
    tokens: int = 0  # number of tokens to score from the start of the stream; 0: all
    # n-gram cache that is mixed into the model's probabilities
    ngram: Literal["none", "hashed5", "backoff", "exact", "tilt"] = "none"
    # backoff counts as published: a target mixed at one order is not counted at lower orders
    ngram_undercount: bool = False
    ngram_memory: float = 4.0  # most memory for the counts of the exact cache, in GiB

    def problems(self) -> dict[str, bool]:
        """For each message, whether options contradict each other or change nothing."""
        sliding, cache = self.mode == "sliding", self.ngram != "none"
        published, memory = self.tail == "published", self.ngram_memory
        windows = self.stride is not None or published
        stream = cache or self.tokens != 0
        default = memory == StreamOptions.ngram_memory
        return {
            "--tokens cannot be negative; 0 scores all tokens": self.tokens < 0,
            "--stride and --tail are for sliding windows; add --mode sliding": windows
            and not sliding,
            "--ngram and --tokens are for a stream; remove --mode none": stream
            and self.mode == "none",
            "--ngram counts each target once, and --tail published scores some targets again;"
            " remove one of the two": cache and published,
            "--ngram-undercount is for --ngram backoff": self.ngram_undercount
            and self.ngram != "backoff",
            "--ngram-memory is for --ngram exact": not default and self.ngram != "exact",
            f"--ngram-memory {memory} is not a number of GiB above 0 and up to"
            f" {MOST_MEMORY:,}": not 0 < memory <= MOST_MEMORY,
        }

    @property
    def is_plain(self) -> bool:
        """Whether only the mode and the stride are chosen: what scores documents."""
        of_windows = StreamOptions(self.mode, self.stride)
        return self == of_windows and self.mode != "none"

    def windows(self, num_tokens: int, seq_len: int) -> Windows:
        """The windows of these options over a stream of `num_tokens`."""
        if self.mode == "standard":
            return standard_windows(num_tokens, seq_len, self.tokens)
        stride = self.stride_within(seq_len)
        return sliding_windows(num_tokens, seq_len, stride, self.tokens, self.tail)

    def stride_within(self, seq_len: int) -> int:
        """The stride of windows of `seq_len`."""
        if self.mode == "standard":
            return seq_len
        return min(STRIDE, seq_len) if self.stride is None else self.stride
