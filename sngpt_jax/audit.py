"""Audits a score. `python -m sngpt_jax.audit --loss 1.9509 --bpb 1.1538 --tokenizer sp1024` asks
which byte count the numbers of a claim imply, and which known mistake explains it. `--run` and
`--artifact` check a model: its bytes, leaks, probabilities, seeds and size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import PathText
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import Json, OptionalInt, OptionalPath, Quiet
from sngpt_jax.evaluation.audit.check import Check, exit_status, unmade
from sngpt_jax.evaluation.audit.published import KNOWN, REPORTED, Count, Mistake
from sngpt_jax.evaluation.options import StreamOptions

if TYPE_CHECKING:  # import jax, which --help and a claim need not
    from jax.sharding import Mesh

    from sngpt_jax.data.shards import Dataset


class Audit(NamedTuple):
    """The result of an audit: rows for a person, figures for JSON, and the checks."""

    rows: list[tuple[str, str]]
    figures: dict[str, Any]
    checks: list[Check]


@dataclass(frozen=True)
class AuditArguments:
    loss: str = ""  # loss of a claim in nats per token, with all of its digits
    bpb: str = ""  # score of the claim in bits per byte, with all of its digits
    # tokenizer of the claim: a file, or the challenge's sp1024, sp8192 or sp8192-caseops, whose
    # byte counts are known
    tokenizer: PathText = ""
    text: PathText = ""  # text that the claim scored: a file or a folder, with --tokenizer FILE
    seq_len: int = 2048  # number of inputs of a window of the claim
    stride: int = 64  # number of targets by which sliding windows advance
    # run directories to audit; several that differ only in their seed show its spread
    run: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[PATH ...]")] = ()
    artifact: OptionalPath = None  # exported model to audit, *.sngpt
    # folder with validation shards: of the claim, or for the model; default: the run's data
    data: OptionalPath = None
    # number of tokens that the claim scored, or that the model scores with --ngram; default: all
    tokens: OptionalInt = None
    # n-gram cache whose mixture with the model is checked, in sliding windows
    ngram: Literal["none", "hashed5", "backoff", "exact", "tilt"] = "none"
    limit: int = 16_000_000  # bytes that artifact and program may take together
    json: Json = ""
    quiet: Quiet = False


def check_arguments(arguments: AuditArguments) -> None:
    """Raises `UserError` for options that are missing, wrong or change nothing."""
    a, default = arguments, AuditArguments()
    model, claim = bool(a.run or a.artifact), bool(a.loss or a.bpb)
    known, sources = a.tokenizer in KNOWN, bool(a.text) + (a.data is not None)
    names = ", ".join(KNOWN)
    of_claim = bool(a.tokenizer or a.text or a.seq_len != default.seq_len)
    problems = {
        "give --loss and --bpb, the numbers of a claim, or a model: --run or --artifact": not model
        and not (a.loss and a.bpb),
        "give either a claim (--loss, --bpb) or a model (--run, --artifact)": model and claim,
        "give either --run or --artifact": bool(a.run and a.artifact),
        "--tokenizer, --text and --seq-len are for a claim": model and of_claim,
        "--ngram and --limit are for a model": not model
        and (a.ngram != "none" or a.limit != default.limit),
        "--tokens is for a claim, or for --ngram": model
        and a.tokens is not None
        and a.ngram == "none",
        "--limit is for --artifact, and at least 1": a.limit != default.limit
        and (not a.artifact or a.limit < 1),
        f"--tokenizer {a.tokenizer} has known counts; remove --text and --data": known and sources,
        "give either --text or --data": sources > 1,
        f"--tokenizer: give {names}, or a file with --text": claim and not (known or sources),
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
            "Audits the numbers of a claim, runs, or an artifact. Exit status: 0 if no check"
            " failed, 1 if a check failed, 2 for a mistake in the options or files."
        ),
    )
    check_arguments(arguments)
    cli.log_to_stderr(arguments.quiet)
    found = audit_claim(arguments) if arguments.loss else audit_models(arguments)
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
    reported: Sequence[Mistake] = ()
    if count := KNOWN.get(a.tokenizer):
        right, recomputed, reported = [count], claims.float32_sums(count, a.stride), REPORTED
    else:
        right, recomputed = recount_text(a)
    checks = [
        claims.judge_bytes(claim, right, recomputed, reported),
        claims.judge_tokens(claim, right[0], a.seq_len, a.stride),
    ]
    only = "the numbers of a claim do not show it; audit the model with --run or --artifact"
    checks += [unmade(name, only) for name in ("probabilities", "leak")]
    found = claims.figures(claim, right[0])
    return Audit(claims.rows_of(found, right[0]), {"claim": found}, checks)


def recount_text(arguments: AuditArguments) -> tuple[list[Count], list[Mistake]]:
    """The right counts of the text that `--text` or `--data` names, and the mistakes with it."""
    from sngpt_jax.data.corpus import Reading
    from sngpt_jax.data.shards import open_dataset
    from sngpt_jax.data.tokenizer import MAX_VOCAB, load_tokenizer
    from sngpt_jax.evaluation.audit.recount import recount

    if arguments.data:
        dataset = open_dataset(arguments.data, MAX_VOCAB)
        tokenizer, stream = dataset.tokenizer, dataset.val
        what = f"the validation text in {arguments.data}"
    else:
        from sngpt_jax.evaluation.documents import encode  # imports jax, which takes seconds

        tokenizer = load_tokenizer(arguments.tokenizer)
        stream, what = encode(arguments.text, Reading(), tokenizer, 0).stream, arguments.text
    targets = len(stream) - 1
    if arguments.tokens is not None:
        targets = min(targets, arguments.tokens)
    windows = {"seq_len": arguments.seq_len, "stride": arguments.stride}
    return recount(stream, tokenizer, what, targets, **windows)


# ---------------------------------------- a model


def audit_models(arguments: AuditArguments) -> Audit:
    """The checks of runs or of an artifact."""
    import jax

    from sngpt_jax.cluster.mesh import make_mesh
    from sngpt_jax.evaluation.audit import result
    from sngpt_jax.run.directory import read_config, read_summary

    a, mesh, checks = arguments, make_mesh(), []
    paths = (a.artifact,) if a.artifact else a.run
    for path in paths:
        found = audit_model(arguments, path, mesh)
        named = len(paths) > 1
        checks += [replace(x, name=f"{path}: {x.name}") for x in found] if named else found
        jax.clear_caches()
    if a.artifact:
        checks.append(result.judge_size(a.artifact, a.artifact.with_suffix(".pyz"), a.limit))
        checks.append(unmade("seeds", "an artifact is of one run; name several with --run"))
    else:
        summaries = {str(path): read_summary(path) for path in a.run}
        scores = {name: summary.val_bpb for name, summary in summaries.items() if summary}
        checks.append(
            result.judge_seeds({name: read_config(Path(name)) for name in scores}, scores)
        )
        checks.append(
            unmade("size", "a run has no artifact; export it, and name it with --artifact")
        )
    names = ", ".join(map(str, paths))
    return Audit([("artifact" if a.artifact else "run", names)], {"audited": names}, checks)


def audit_model(arguments: AuditArguments, path: Path, mesh: "Mesh") -> list[Check]:
    """The checks of one run or artifact and of its data."""
    from sngpt_jax.data.shards import open_dataset
    from sngpt_jax.data.tokenizer import MAX_VOCAB
    from sngpt_jax.evaluation.audit import probabilities, text
    from sngpt_jax.evaluation.report import score
    from sngpt_jax.run.console import progress_reporter
    from sngpt_jax.weights.source import open_model

    a = arguments
    model = open_model(None, path, mesh) if a.artifact else open_model(path, None, mesh)
    dataset = model.open_data(a.data)
    checks = [] if a.artifact else [audit_summary(path, dataset, a)]
    checks.append(text.judge_table(dataset))
    progress = progress_reporter("decode")
    checks.append(text.judge_decoded(dataset.val, dataset.tokenizer, progress))
    trained_in = Path(model.config.data.dir)
    if trained_in.is_dir():
        checks.append(text.judge_leak(dataset, open_dataset(trained_in, MAX_VOCAB)))
    else:
        checks.append(unmade("leak", f"the training text in {trained_in} is gone"))
    masses = probabilities.masses(model.config, model.variables, dataset.val, mesh)
    checks.append(probabilities.judge_masses(masses, model.config.model))
    scored = None
    if a.ngram != "none":
        stride = min(a.stride, model.config.data.seq_len)
        options = StreamOptions("sliding", stride, tokens=a.tokens or 0, ngram=a.ngram)
        scored = score(options, model.config, model.variables, dataset, mesh)
    return [*checks, probabilities.judge_cache(scored)]


def audit_summary(run: Path, dataset: "Dataset", arguments: AuditArguments) -> Check:
    """Whether the scores that the run keeps imply the right byte count."""
    from sngpt_jax.evaluation.audit.recount import recount
    from sngpt_jax.evaluation.audit.result import judge_summary
    from sngpt_jax.run.directory import read_config, read_summary

    if arguments.data:
        return unmade(
            "summary", "the run's own scores are of its own data, and --data names others"
        )
    summary, config = read_summary(run), read_config(run)
    if summary is None:
        return unmade("summary", "the run has not finished")
    seq_len = config.data.seq_len
    counts, mistakes = recount(
        dataset.val,
        dataset.tokenizer,
        f"the first {summary.val_tokens:,} targets of {dataset.directory}",
        summary.val_tokens,
        seq_len=seq_len,
        stride=min(arguments.stride, seq_len),
    )
    return judge_summary(summary.val_loss, summary.val_bpb, summary.val_tokens, counts, mistakes)


if __name__ == "__main__":
    cli.run(main)
