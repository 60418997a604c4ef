"""Audits a score: `python -m sngpt_jax.audit --loss 1.9509 --bpb 1.1538 --tokenizer sp1024` asks
which byte count the numbers of a claim imply, and which known mistake explains it.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import PathText
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import Json, OptionalInt, OptionalPath, Quiet
from sngpt_jax.evaluation.audit.check import Check, exit_status, unmade
from sngpt_jax.evaluation.audit.published import KNOWN, REPORTED, Count, Mistake

logger = logging.getLogger("sngpt_jax")


class Audit(NamedTuple):
    """The result of an audit: rows for a person, figures for JSON, and the checks."""

    rows: list[tuple[str, str]]
    figures: dict[str, Any]
    checks: list[Check]


@dataclass(frozen=True)
class AuditArguments:
    loss: str = ""  # loss of a claim in nats per token, with all of its digits
    bpb: str = ""  # score of the claim in bits per byte, with all of its digits
    tokens: OptionalInt = None  # number of tokens that the claim scored
    # tokenizer of the claim: a file, or the challenge's sp1024, sp8192 or sp8192-caseops, whose
    # byte counts are known
    tokenizer: PathText = ""
    text: PathText = ""  # text that the claim scored: a file or a folder, with --tokenizer FILE
    data: OptionalPath = None  # folder with the validation shards that the claim scored
    seq_len: int = 2048  # number of inputs of a window of the claim
    stride: int = 64  # number of targets by which the claim's sliding windows advance
    json: Json = ""
    quiet: Quiet = False


def check_arguments(arguments: AuditArguments) -> None:
    """Raises `UserError` for options that are missing, wrong or change nothing."""
    a = arguments
    known, sources = a.tokenizer in KNOWN, bool(a.text) + (a.data is not None)
    names = ", ".join(KNOWN)
    problems = {
        "give --loss and --bpb, the two numbers of a claim": not (a.loss and a.bpb),
        f"--tokenizer {a.tokenizer} has known counts; remove --text and --data": known and sources,
        "give either --text or --data": sources > 1,
        f"--tokenizer: give {names}, or a file with --text": not (known or sources),
        "--text needs --tokenizer FILE": bool(a.text) and not a.tokenizer,
        "--data has its own tokenizer; remove --tokenizer": bool(a.data and a.tokenizer),
        "--tokens has to be at least 1": a.tokens is not None and a.tokens < 1,
        "--seq-len and --stride: give 1 <= stride <= seq_len": not 1 <= a.stride <= a.seq_len,
    }
    for message, wrong in problems.items():
        if wrong:
            raise UserError(message)
    cli.check_json(a.json)


def main(argv: Sequence[str]) -> int:
    arguments = parse(
        AuditArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.audit",
        description=(
            "Audits a score. Exit status: 0 if no check failed, 1 if a check failed, 2 for a"
            " mistake in the options or files."
        ),
    )
    check_arguments(arguments)
    cli.log_to_stderr(arguments.quiet)
    found = audit_claim(arguments)
    if arguments.json != "-":
        rows = [*found.rows, *(check.row() for check in found.checks)]
        terminal.show_result("audited", rows)
    result = {**found.figures, "checks": [asdict(check) for check in found.checks]}
    cli.write_json(result, arguments.json)
    return exit_status(found.checks)


# ---------------------------------------- a claim


def audit_claim(arguments: AuditArguments) -> Audit:
    """What the numbers of a claim imply, and the checks of them."""
    from sngpt_jax.evaluation.audit import claim as claims

    a = arguments
    claim = claims.Claim(
        claims.Printed.parse(a.loss, "--loss"), claims.Printed.parse(a.bpb, "--bpb"), a.tokens
    )
    if count := KNOWN.get(a.tokenizer):
        right, recomputed, reported = [count], claims.float32_sums(count, a.stride), REPORTED
    else:
        right, recomputed = recount_text(a)
        reported = ()
    checks = [
        claims.judge_bytes(claim, right, recomputed, reported),
        claims.judge_tokens(claim, right[0], a.seq_len, a.stride),
    ]
    only = "the numbers of a claim do not show it"
    checks += [unmade(name, only) for name in ("probabilities", "leak")]
    found = claims.figures(claim, right[0])
    return Audit(claims.rows_of(found, right[0]), {"claim": found}, checks)


def recount_text(arguments: AuditArguments) -> tuple[list[Count], list[Mistake]]:
    """The right counts of the text that `--text` or `--data` names, and the mistakes with it."""
    from sngpt_jax.data.shards import open_dataset
    from sngpt_jax.data.tokenizer import MAX_VOCAB, load_tokenizer
    from sngpt_jax.evaluation.audit.recount import encoded, knows_text, recount

    has_text = True
    if arguments.data:
        dataset = open_dataset(arguments.data, MAX_VOCAB)
        tokenizer, stream = dataset.tokenizer, dataset.val
        what = f"the validation text in {arguments.data}"
        has_text = knows_text(dataset)
    else:
        tokenizer = load_tokenizer(arguments.tokenizer)
        stream, what = encoded(arguments.text, tokenizer), arguments.text
    targets = len(stream) - 1
    if arguments.tokens is not None:
        targets = min(targets, arguments.tokens)
    windows = {"seq_len": arguments.seq_len, "stride": arguments.stride}
    return recount(stream, tokenizer, what, targets, **windows, has_text=has_text)


if __name__ == "__main__":
    cli.run(main)
