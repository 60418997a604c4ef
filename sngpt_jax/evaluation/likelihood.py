"""A model's likelihoods of texts and its continuations of prompts, for downstream tasks.

Every text begins with BOS. The model sees at most T = data.seq_len tokens at a time. A longer text
loses its first tokens, BOS included, as most windows of training do.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import OnProgress, one_behind
from sngpt_jax.model.attention import ntk_base
from sngpt_jax.model.forward import Variables
from sngpt_jax.model.generation import LEAST_LENGTH, generate_tokens, next_power_of_two


@dataclass(frozen=True)
class Continuation:
    """The model's scores of one continuation of a context."""

    logprob: float  # ln p of all scored tokens together
    greedy: bool  # whether each scored token is the likeliest one of the model's whole table
    tokens: int  # scored tokens; 0 where the tokenizer drops all of the continuation


class _Row(NamedTuple):
    """One row of a batch, which scores the last targets of a piece of text."""

    pair: int  # index of the (context, continuation)
    tokens: np.ndarray  # int32 [length + 1]: the inputs and, shifted by one, the targets
    length: int
    scored: int  # number of targets to score


def _rows(pair: int, tokens: np.ndarray, first: int, seq_len: int) -> Iterator[_Row]:
    """Rows of at most `seq_len` inputs that score every target from index `first` on once, with as
    many inputs before a row's last target as fit, as lm-eval's `get_rolling_token_windows`.
    """
    targets = len(tokens) - 1
    for start in range(first, targets, seq_len):
        stop = min(start + seq_len, targets)
        begin = max(0, stop - seq_len)
        yield _Row(pair, tokens[begin : stop + 1], stop - begin, stop - start)


@functools.cache  # so that one program serves all calls
def _eval_step(config: ModelConfig, mesh: Mesh, seq_len: int) -> Fitted:
    # NTK scaling derives the rotary base from the length; shorter rows take the base of training
    base = ntk_base(config.rope_base, config.rotary_dims, seq_len, config.rope_ntk_len)
    fixed = dataclasses.replace(config, rope_base=base, rope_ntk_len=0)
    return Fitted(make_eval_step(fixed, mesh, ("nll", "greedy")), mesh, "scoring")


def cut_at(text: str, until: Sequence[str]) -> str:
    """`text` up to the first place where one of `until` begins. Empty strings are ignored."""
    return min((text.partition(stop)[0] for stop in until if stop), key=len, default=text)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A trained model with its tokenizer. All processes make equal calls."""

    config: Config
    variables: Variables  # laid out over the mesh
    tokenizer: Tokenizer
    mesh: Mesh

    def __post_init__(self) -> None:
        size, most = self.tokenizer.vocab_size, self.config.model.vocab_size
        if size > most:
            raise UserError(
                f"the tokenizer has {size} tokens, more than model.vocab_size = {most}; give the"
                " tokenizer that the model was trained with"
            )

    @property
    def seq_len(self) -> int:
        """T, the most tokens that the model sees at a time."""
        return self.config.data.seq_len

    def _document(self, text: str) -> np.ndarray:
        tokens = self.tokenizer.encode(text)
        return np.concatenate([[self.tokenizer.bos_id], tokens]).astype(np.int32)

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: OnProgress | None = None
    ) -> list[Continuation]:
        """The likelihood of the continuation in each (context, continuation).

        The scored tokens begin where the encoding of both differs from that of the context alone,
        so a token that spans the border is scored. Raises `UserError` if losses are not finite.
        """
        contexts = {context: self._document(context) for context, _ in pairs}
        rows: list[_Row] = []
        for i, (context, continuation) in enumerate(pairs):
            head, whole = contexts[context], self._document(context + continuation)
            same = min(len(head), len(whole))
            shared = int(np.argmin(np.append(head[:same] == whole[:same], False)))
            rows += _rows(i, whole, shared - 1, self.seq_len)

        logprob, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        tokens = np.zeros(len(pairs), np.int64)
        for done, (row, nll, likeliest) in enumerate(self._score(rows), 1):
            logprob[row.pair] -= np.sum(nll, dtype=np.float64)
            greedy[row.pair] &= np.all(likeliest)
            tokens[row.pair] += row.scored
            if progress:
                progress(done, len(rows))
        if not np.all(np.isfinite(logprob)):
            raise UserError(
                "the model's losses are not finite; take an earlier --step or other --weights"
            )
        return list(map(Continuation, logprob.tolist(), greedy.tolist(), tokens.tolist()))

    def _score(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, np.ndarray, np.ndarray]]:
        """Each row, the longest first, the nll of its scored targets, and whether each is the
        likeliest token.
        """
        step = _eval_step(self.config.model, self.mesh, self.seq_len)
        place, devices = batch_placer(self.mesh), self.mesh.devices.size
        widest = next_power_of_two(max((row.scored for row in rows), default=1))

        def padded(row: _Row) -> int:
            # causal attention never sees the padding
            return min(self.seq_len, max(LEAST_LENGTH, next_power_of_two(row.length)))

        def dispatched() -> Iterator[tuple[dict[str, jax.Array], list[_Row], np.ndarray]]:
            for T, group in groupby(sorted(rows, key=padded, reverse=True), padded):
                equal, S = list(group), min(T, widest)
                most = max(1, self.config.eval.device_batch_tokens // T)
                # few sizes, so few programs
                B = min(most, next_power_of_two(math.ceil(len(equal) / devices))) * devices
                for first in range(0, len(equal), B):
                    part = equal[first : first + B]
                    tokens_BT, offsets_B = np.zeros((B, T + 1), np.int32), np.zeros(B, np.int32)
                    for b, row in enumerate(part):
                        tokens_BT[b, : len(row.tokens)] = row.tokens
                        offsets_B[b] = min(row.length - row.scored, T - S)
                    scored_BS = offsets_B[:, None] + np.arange(S)[None]
                    batch = {
                        "inputs": tokens_BT[:, :-1],
                        "targets": np.take_along_axis(tokens_BT[:, 1:], scored_BS, axis=1),
                        "offsets": offsets_B,
                    }
                    yield step(self.variables, place(batch)), part, offsets_B

        for found, part, offsets_B in one_behind(dispatched()):
            nll_BS, greedy_BS = np.asarray(found["nll"]), np.asarray(found["greedy"])
            for b, row in enumerate(part):
                end = row.length - int(offsets_B[b])
                scored = slice(end - row.scored, end)
                yield row, nll_BS[b, scored], greedy_BS[b, scored]

    def generate(
        self,
        prompts: Sequence[str],
        until: Sequence[str],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        progress: OnProgress | None = None,
    ) -> list[str]:
        """The text that the model adds to each prompt: at most `max_tokens` tokens, up to the first
        of `until` or a new document.

        A long prompt loses its first tokens. `temperature` 0 is greedy. Raises `UserError` if
        `max_tokens` leaves no room for a prompt within T tokens.
        """
        T, decode = self.seq_len, self.tokenizer.decode
        if not 0 < max_tokens < T:
            raise UserError(
                f"{max_tokens} tokens to generate leave no room for a prompt within data.seq_len ="
                f" {T}; ask for 1 to {T - 1}"
            )
        heads = [self._document(prompt)[max_tokens - T :] for prompt in prompts]
        order = sorted(range(len(heads)), key=lambda i: len(heads[i]), reverse=True)
        B = max(1, self.config.eval.device_batch_tokens // T) * self.mesh.devices.size
        texts = [""] * len(heads)
        for number, first in enumerate(range(0, len(order), B)):
            part = order[first : first + B]
            added = generate_tokens(
                self.config.model,
                self.variables,
                self.mesh,
                [heads[i] for i in part],
                seq_len=T,
                max_tokens=max_tokens,
                vocab_size=self.tokenizer.vocab_size,
                end_id=self.tokenizer.bos_id,
                temperature=temperature,
                top_k=top_k,
                seed=seed + number,
            )
            for i, tokens in zip(part, added, strict=True):
                # decoded with the prompt: at the start of a text a first space would be dropped
                whole = decode(np.concatenate([heads[i], tokens]))
                texts[i] = cut_at(whole[len(decode(heads[i])) :], until)
            if progress:
                progress(first + len(part), len(order))
        return texts
