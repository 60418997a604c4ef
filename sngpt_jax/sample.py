"""Text from a trained model: `python -m sngpt_jax.sample --run runs/quickstart --prompt "def "`."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import PathText
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import (
    Json,
    KernelsOption,
    OptionalInt,
    OptionalPath,
    Quiet,
    WeightsOption,
)

if TYPE_CHECKING:  # imports jax
    from jax.sharding import Mesh

    from sngpt_jax.model.generation import Grown
    from sngpt_jax.weights.trained_model import TrainedModel

AT_A_TIME = 4  # tokens of a text between two looks at it while it streams
REPLACEMENT = "\ufffd"  # stands for bytes that are no whole character


@dataclass(frozen=True)
class SampleArguments:
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # exported model, *.sngpt, instead of --run
    prompt: str = ""  # text to continue; empty: begin a new document
    # file or folder of prompts instead of --prompt, a prompt per document; -: standard input
    prompts: PathText = ""
    samples: int = 1  # number of texts for each prompt
    max_tokens: int = 128  # number of tokens to generate at most
    temperature: float = 0.8  # divides the logits; 0: always take the most probable token
    top_k: int = 0  # draw from this many of the most probable tokens; 0: from all
    # draw from the fewest most probable tokens whose probabilities sum to this; 1: from all
    top_p: float = 1.0
    seed: int = 0  # seed of the random draws
    step: OptionalInt = None  # checkpoint to load; default: the latest
    weights: WeightsOption = None
    kernels: KernelsOption = "check"
    json: Json = ""
    quiet: Quiet = False


def check(arguments: SampleArguments) -> None:
    """Raises `UserError` for options that are out of range or contradict each other."""
    problems = {
        "--max-tokens must be 1 or more": arguments.max_tokens < 1,
        "--samples must be 1 or more": arguments.samples < 1,
        "--temperature must be a finite number of 0 or more": (
            not 0 <= arguments.temperature < math.inf
        ),
        "--top-k must be 0 or more; 0 draws from all tokens": arguments.top_k < 0,
        "--top-p must be above 0 and at most 1; 1 draws from all tokens": (
            not 0 < arguments.top_p <= 1
        ),
        f"--seed {arguments.seed} is not between 0 and {2**32 - 1}": (
            not 0 <= arguments.seed < 2**32
        ),
        "give either --prompt or --prompts": bool(arguments.prompt and arguments.prompts),
    }
    for message, wrong in problems.items():
        if wrong:
            raise UserError(message)
    cli.check_json(arguments.json)


def prompts_of(arguments: SampleArguments) -> list[str]:
    """The prompts: documents of `--prompts` without their last line end, or the one prompt."""
    if not arguments.prompts:
        return [arguments.prompt]
    from sngpt_jax.data.corpus import as_path, documents  # slow to import

    with as_path(arguments.prompts) as path:
        found = [text.removesuffix("\n") for text in documents(path)]
    if not found:
        raise UserError(f"--prompts {arguments.prompts}: holds no prompt; write one into it")
    return found


@dataclass
class Pieces:
    """The text of tokens that arrive one after the other, in pieces of whole characters.

    The pieces together are the text that `decode` makes of all tokens.
    """

    decode: Callable[[Sequence[int]], str]
    tokens: list[int] = field(default_factory=list)
    known: int = 0  # tokens whose text has been given
    before: int = 0  # where the last piece's tokens began; a token's text depends on that before it

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The next piece: all text so far, but before the `last` tokens not the bytes of a
        character that is not whole yet.
        """
        self.tokens += tokens
        given = self.decode(self.tokens[self.before : self.known])
        text = self.decode(self.tokens[self.before :])
        if not last and (text.endswith(REPLACEMENT) or len(text) <= len(given)):
            return ""
        self.before, self.known = self.known, len(self.tokens)
        return text[len(given) :]


def stream(
    growing: Iterator["Grown"],
    heads: Sequence[np.ndarray],
    decode: Callable[[Any], str],
    begun: int,
) -> "Grown":
    """Prints texts while they grow, one after the other and with a separator between two: the
    first one that is not complete is shown as far as it is. `begun` is the number of texts printed
    before. Returns the complete texts.
    """
    row, shown, pieces, grown = 0, 0, None, None
    for grown in growing:
        while row < len(heads):
            if pieces is None:
                separate(begun + row)
                pieces, shown = Pieces(decode), 0
                print(cli.escape_controls(pieces.add(heads[row][1:].tolist())), end="")
            done = grown.complete[row]
            piece = pieces.add(grown.added[row][shown:].tolist(), last=done)
            print(cli.escape_controls(piece), end="\n" if done else "", flush=True)
            shown = len(grown.added[row])
            if not done:
                break
            row, pieces = row + 1, None
    assert grown
    return grown


def separate(number: int) -> None:
    """Prints the line between two texts, before text `number`."""
    from sngpt_jax.data.corpus.reading import SEPARATOR

    if number:
        print(SEPARATOR)


def sample(
    arguments: SampleArguments, model: "TrainedModel", mesh: "Mesh", prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Generates and prints the texts; returns what `--json` says of each."""
    from sngpt_jax.model.generation import grow, start_of

    config, tokenizer = model.config, model.tokenizer()
    prompts = [prompt for prompt in prompts for _ in range(arguments.samples)]
    heads = [start_of(tokenizer, prompt) for prompt in prompts]
    at_once = max(1, config.eval.device_batch_tokens // config.model.max_seq_len)
    at_once *= mesh.devices.size
    silent = arguments.json == "-"
    live = not silent and sys.stdout is not None and sys.stdout.isatty()
    found: list[dict[str, Any]] = []
    for first in range(0, len(heads), at_once):
        part = heads[first : first + at_once]
        growing = grow(
            config.model,
            model.variables,
            mesh,
            part,
            seq_len=config.data.seq_len,
            max_tokens=arguments.max_tokens,
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.bos_id,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            first=first,
            at_a_time=AT_A_TIME if live else 0,
        )
        if live:
            grown = stream(growing, part, tokenizer.decode, first)
        else:
            *_, grown = growing
        for prompt, head, added in zip(prompts[first:], part, grown.added, strict=False):
            text = tokenizer.decode(np.concatenate([head[1:], added]))
            if not (live or silent):
                separate(len(found))
                print(cli.escape_controls(text), flush=True)
            whole = len(added) < arguments.max_tokens
            found.append({"prompt": prompt, "text": text, "tokens": len(added), "ended": whole})
    return found


def main(argv: Sequence[str]) -> int:
    arguments = parse(
        SampleArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.sample",
        description="Generates text.",
    )
    check(arguments)
    cli.log_to_stderr(arguments.quiet)
    prompts = prompts_of(arguments)
    from sngpt_jax.cluster.mesh import make_mesh  # imports jax
    from sngpt_jax.weights.source import open_model

    mesh = make_mesh()
    model = open_model(
        arguments.run,
        arguments.artifact,
        mesh,
        arguments.step,
        arguments.weights,
        arguments.kernels,
    )
    samples = sample(arguments, model, mesh, prompts)
    cli.write_json(
        {"step": model.step, "weights": model.weights, "samples": samples}, arguments.json
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
