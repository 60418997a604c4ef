"""What a model makes of text: how likely it finds continuations, and how it continues by itself.
Downstream tasks ask both.

Every text begins with BOS, as documents do. The model sees at most T = data.seq_len tokens at a
time: a longer text is cut from the left, BOS included, so that it begins in the middle as most
windows of training do.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.model.attention import ntk_base
from sngpt_jax.model.forward import Variables
from sngpt_jax.model.generation import LEAST_LENGTH, generate_tokens, next_power_of_two

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Continuation:
    """What a model makes of one continuation of a context."""

    logprob: float  # ln p of all the scored tokens together
    # each of them is the likeliest after those before it, among all rows of the model's table
    greedy: bool
    tokens: int  # that were scored; 0 where the tokenizer drops all of the continuation


@dataclass(frozen=True, eq=False)
class _Row:
    pair: int  # index of the pair it belongs to
    tokens: np.ndarray  # int32 [t + 1], the inputs and, one on, the targets
    scored: int  # so many targets, the last ones

    @property
    def length(self) -> int:
        return len(self.tokens) - 1


# a row, and of its scored targets the nll and whether each is the likeliest
_Scored = tuple[_Row, np.ndarray, np.ndarray]


def _rows(pair: int, tokens: np.ndarray, first: int, seq_len: int) -> Iterator[_Row]:
    """Rows of at most `seq_len` inputs that score every target from index `first` on once.

    As lm-eval's rolling windows (`get_rolling_token_windows`): each takes up to `seq_len` targets
    that the one before has not scored, with as many inputs before its last target as fit.
    """
    targets = len(tokens) - 1
    for start in range(first, targets, seq_len):
        stop = min(start + seq_len, targets)
        yield _Row(pair, tokens[max(0, stop - seq_len) : stop + 1], stop - start)


@functools.cache  # so that one program serves all calls
def _eval_step(config: ModelConfig, mesh: Mesh, seq_len: int) -> jax.stages.Wrapped:
    # with NTK scaling the rotary base follows from the length: shorter rows have that of the
    # training's too
    base = ntk_base(config.rope_base, config.rotary_dims, seq_len, config.rope_ntk_len)
    return make_eval_step(
        dataclasses.replace(config, rope_base=base, rope_ntk_len=0), mesh, ("nll", "greedy")
    )


def cut_at(text: str, until: Sequence[str]) -> str:
    """`text` up to the first place where one of `until` begins; empty ones are nowhere."""
    return text[
        : min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))
    ]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A trained model with its tokenizer, on the devices of a mesh. Several processes make the
    same calls, each for all.

    Raises `UserError` where the tokenizer has tokens that the model has not.
    """

    config: Config
    variables: Variables  # laid out over the mesh
    tokenizer: Tokenizer
    mesh: Mesh

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size > self.config.model.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, more than model.vocab_size"
                f" = {self.config.model.vocab_size}; take the one that the model was trained with"
            )

    @property
    def seq_len(self) -> int:
        """T, the most tokens that the model sees at a time."""
        return self.config.data.seq_len

    def _document(self, text: str) -> np.ndarray:
        return np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(text)]).astype(
            np.int32
        )

    # ------------------------------------------------------------------------------------------ likelihoods

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[Continuation]:
        """How likely each (context, continuation) finds its continuation.

        Both are encoded together, and all tokens are scored that the context alone does not begin
        with: where a token spans the border, or the tokenizer drops a space there, no part of the
        continuation is left out. A continuation of more than T tokens is scored in several rows,
        see `_rows`. What a pair is given does not depend on the others, but for rounding. Raises
        `UserError` where the model's losses are not finite.
        """
        contexts = {context: self._document(context) for context, _ in pairs}
        rows: list[_Row] = []
        for i, (context, continuation) in enumerate(pairs):
            head, whole = contexts[context], self._document(context + continuation)
            same = min(len(head), len(whole))
            differing = np.flatnonzero(head[:same] != whole[:same])
            shared = int(differing[0]) if len(differing) else same
            rows.extend(_rows(i, whole, shared - 1, self.seq_len))

        logprob, greedy = np.zeros(len(pairs), np.float64), np.ones(len(pairs), bool)
        tokens = np.zeros(len(pairs), np.int64)
        done = 0
        for batch in self._score(rows):
            for row, nll, likeliest in batch:
                logprob[row.pair] -= np.sum(nll, dtype=np.float64)
                greedy[row.pair] &= bool(np.all(likeliest))
                tokens[row.pair] += row.scored
            done += len(batch)
            if progress:
                progress(done, len(rows))
        if not np.all(np.isfinite(logprob)):
            raise UserError(
                "the model's losses are not finite; take an earlier --step, or other weights"
            )
        return [
            Continuation(*found)
            for found in zip(logprob.tolist(), greedy.tolist(), tokens.tolist(), strict=True)
        ]

    def rolling(self, texts: Sequence[str], progress: Progress | None = None) -> list[float]:
        """ln p of each whole text after BOS; longer ones than T tokens in windows, each token
        scored once.
        """
        return [
            found.logprob for found in self.loglikelihood([("", text) for text in texts], progress)
        ]

    def _score(self, rows: Sequence[_Row]) -> Iterator[list[_Scored]]:
        """What the model makes of `rows`, a batch at a time, the longest rows first.

        A batch of rows padded to T inputs computes logits at S positions, enough for the row that
        scores most. It is dispatched before the one before it is read, so that the devices do not
        wait for the host.
        """
        step, place = (
            _eval_step(self.config.model, self.mesh, self.seq_len),
            batch_placer(self.mesh),
        )
        devices = self.mesh.devices.size
        widest = next_power_of_two(max((row.scored for row in rows), default=1))

        def padded(row: _Row) -> int:
            # causal attention never sees what fills up
            return min(self.seq_len, max(LEAST_LENGTH, next_power_of_two(row.length)))

        def read(
            found: dict[str, jax.Array], part: Sequence[_Row], offsets_B: np.ndarray
        ) -> list[_Scored]:
            nll_BS, greedy_BS = np.asarray(found["nll"]), np.asarray(found["greedy"])
            ends = [
                row.length - offset for row, offset in zip(part, offsets_B.tolist(), strict=False)
            ]
            return [
                (row, nll_BS[b, end - row.scored : end], greedy_BS[b, end - row.scored : end])
                for b, (row, end) in enumerate(zip(part, ends, strict=True))
            ]

        pending: tuple[dict[str, jax.Array], Sequence[_Row], np.ndarray] | None = None
        for T, group in groupby(sorted(rows, key=padded, reverse=True), padded):
            same_length, S = list(group), min(T, widest)
            most = max(1, self.config.eval.device_batch_tokens // T)
            # few sizes, so few programs
            B = min(most, next_power_of_two(math.ceil(len(same_length) / devices))) * devices
            for first in range(0, len(same_length), B):
                part = same_length[first : first + B]
                tokens_BT, offsets_B = np.zeros((B, T + 1), np.int32), np.zeros(B, np.int32)
                for b, row in enumerate(part):
                    tokens_BT[b, : len(row.tokens)] = row.tokens
                    offsets_B[b] = min(row.length - row.scored, T - S)
                targets_BS = np.take_along_axis(
                    tokens_BT[:, 1:], offsets_B[:, None] + np.arange(S)[None], axis=1
                )
                batch = {"inputs": tokens_BT[:, :-1], "targets": targets_BS, "offsets": offsets_B}
                dispatched = step(self.variables, place(batch)), part, offsets_B
                if pending:
                    yield read(*pending)
                pending = dispatched
        if pending:
            yield read(*pending)

    # ------------------------------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Sequence[str],
        until: Sequence[str],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]:
        """What the model adds to each prompt: the text of at most `max_tokens` tokens, up to one
        of `until` or a new document.

        A prompt that leaves no room for them within T tokens is cut from the left. `temperature` 0
        takes the likeliest token, and the text then depends on its prompt alone; other draws also
        depend on the batches, but repeat with the seed. Raises `UserError` where `max_tokens`
        leaves no room for a prompt.
        """
        room = self.seq_len - max_tokens
        if max_tokens < 1 or room < 1:
            raise UserError(
                f"{max_tokens} tokens to generate leave no room for a prompt within data.seq_len ="
                f" {self.seq_len}; ask for 1 to {self.seq_len - 1}"
            )
        heads = [self._document(prompt)[-room:] for prompt in prompts]
        order = sorted(range(len(heads)), key=lambda i: len(heads[i]), reverse=True)
        B = max(1, self.config.eval.device_batch_tokens // self.seq_len) * self.mesh.devices.size
        texts = [""] * len(heads)
        for number, first in enumerate(range(0, len(order), B)):
            part = order[first : first + B]
            added = generate_tokens(
                self.config.model,
                self.variables,
                self.mesh,
                [heads[i] for i in part],
                seq_len=self.seq_len,
                max_tokens=max_tokens,
                vocab_size=self.tokenizer.vocab_size,
                end_id=self.tokenizer.bos_id,
                temperature=temperature,
                top_k=top_k,
                seed=seed + number,
            )
            for i, tokens in zip(part, added, strict=True):
                # decoded with the prompt, since a space before the first of them is dropped at the
                # start of a text
                start = len(self.tokenizer.decode(heads[i]))
                texts[i] = cut_at(
                    self.tokenizer.decode(np.concatenate([heads[i], tokens]))[start:], until
                )
            if progress:
                progress(first + len(part), len(order))
        return texts
