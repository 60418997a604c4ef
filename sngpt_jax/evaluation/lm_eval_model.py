"""A model of this project behind the interface of lm-eval, EleutherAI's lm-evaluation-harness.

Several processes each run the whole task on the model that they share, and get equal results.
"""

from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.likelihood import LanguageModel
from sngpt_jax.evaluation.windows import OnProgress

MAX_TOKENS = 256  # where a task names no length; at most half of data.seq_len


class Answer(tuple[float, bool]):
    """lm-eval's (ln p, greedy) of a continuation, with the number of `tokens` that were scored."""

    tokens: int


class SngptLM(LM):
    """`likelihood.LanguageModel` behind lm-eval's interface."""

    def __init__(self, model: LanguageModel, progress: OnProgress | None = None) -> None:
        super().__init__()
        self.model = model
        self.progress = progress

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        """The answer to each request's (context, continuation)."""
        answers = []
        for found in self.model.loglikelihood([one.args for one in requests], self.progress):
            answers.append(Answer((found.logprob, found.greedy)))
            answers[-1].tokens = found.tokens
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p of each request's whole text."""
        texts = [("", request.args[0]) for request in requests]
        return [found.logprob for found in self.model.loglikelihood(texts, self.progress)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that continues each request's (context, options), greedy unless the options give
        a temperature. Raises `UserError` for unsupported options that would change the text.
        """
        texts: list[str] = []
        for options, group in groupby(requests, lambda request: request.args[1]):
            prompts = [request.args[0] for request in group]
            supported = self._options(options)
            texts += self.model.generate(prompts, **supported, progress=self.progress)
        return texts

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `LanguageModel.generate` for lm-eval's options."""
        length = min(MAX_TOKENS, self.model.seq_len // 2)
        rest: dict[str, Any] = {**normalize_gen_kwargs(options, length)}
        temperature = float(rest.pop("temperature", 1.0 if rest.pop("do_sample") else 0.0))
        supported = {
            "until": rest.pop("until"),
            "max_tokens": rest.pop("max_gen_toks"),
            "temperature": temperature,
            "top_k": max(0, rest.pop("top_k", 0) or 0),  # None, 0 and -1 all mean off
        }
        if not temperature:
            rest.pop("top_p", None)
        # the value 1 changes nothing, for num_beams as for top_p
        others = ", ".join(f"{name} = {value}" for name, value in rest.items() if value != 1)
        if others:
            raise UserError(
                f"the task generates with {others}, which is not supported; remove it from the task"
            )
        return supported
