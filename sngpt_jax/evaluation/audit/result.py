"""A run's own numbers, the spread over seeds, and the size of an artifact."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sngpt_jax.config import Config, changed, differences
from sngpt_jax.evaluation.audit.check import Check, unmade, verdict
from sngpt_jax.evaluation.audit.claim import Claim, Printed, judge_bytes
from sngpt_jax.evaluation.audit.published import Count, Mistake


def judge_summary(
    loss: float, bpb: float, tokens: int, right: Sequence[Count], mistakes: Sequence[Mistake]
) -> Check:
    """Whether the loss and the score of a run's summary imply the right byte count."""
    printed = Printed.parse(repr(loss), "val_loss"), Printed.parse(repr(bpb), "val_bpb")
    check = judge_bytes(Claim(*printed, tokens), right, mistakes, [])
    return replace(
        check, name="summary", text=f"loss {loss:.6f}, {bpb:.6f} bits/byte: {check.text}"
    )


def judge_seeds(configs: Mapping[str, Config], scores: Mapping[str, float]) -> Check:
    """The spread of the `scores` of runs, by name, that differ in nothing but their seeds."""
    if len(scores) < 2:
        return unmade("seeds", "this needs two or more finished runs; name them all with --run")
    first = next(iter(configs.values()))
    seed = {"seed": first.train.seed}
    others = {
        line
        for config in configs.values()
        for line in differences(first, changed(config, train=seed))
    }
    if others:
        return verdict("seeds", False, f"the runs differ in more than the seed: {min(others)}")
    seeds = Counter(config.train.seed for config in configs.values())
    if twice := [seed for seed, count in seeds.items() if count > 1]:
        return verdict("seeds", False, f"{seeds[twice[0]]} runs have the seed {twice[0]}")
    values = np.array(list(scores.values()))
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    listed = ", ".join(
        f"{value:.5f} ({configs[name].train.seed})" for name, value in scores.items()
    )
    text = f"{mean:.5f} ± {deviation:.5f} bits/byte, mean and standard deviation of {listed}"
    return verdict("seeds", True, text, mean=mean, standard_deviation=deviation)


def judge_size(artifact: Path, program: Path, limit: int) -> Check:
    """Whether the artifact and the program that scores it fit into `limit` bytes."""
    if not program.is_file():
        return unmade("size", f"the program {program} is missing; export the model again")
    file, code = artifact.stat().st_size, program.stat().st_size
    over = file + code - limit
    verdict_text = f"{over:,} over" if over > 0 else f"{-over:,} below"
    text = f"{file:,} + {code:,} bytes of program, {verdict_text} the limit of {limit:,}"
    return verdict("size", over <= 0, text, artifact_bytes=file, code_bytes=code, limit=limit)
