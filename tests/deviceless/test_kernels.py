"""The instructions per token of the Cayley kernels, compiled for an H100 that is not there."""

import json
import subprocess
import sys

import pytest

from sngpt_jax.ahead import sass, targets


def can_count() -> bool:
    try:
        return targets.has_plugin() and bool(sass.find_nvdisasm())
    except targets.MissingToolchain:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_count(), reason=f"needs plugin and nvdisasm: {targets.INSTALL}"),
]

# warp instructions and barriers per token of cayley_small_3l, at most
LIMITS = {
    "cayley_forward": (31_500, 33),
    "cayley_backward": (10_000, 16),
    "cayley_bias_gradient": (1_000, 0),
}


def test_instructions_per_token() -> None:
    chosen = ["cayley", "--case", "cayley_small_3l", "--target", "h100", "--sass", "--json"]
    command = [sys.executable, "-m", "sngpt_jax.plan", "--kernels", *chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, program = json.loads(done.stdout)["cases"][0]["programs"]
    kernels = {kernel["name"]: kernel for kernel in program["kernels"] if kernel["pallas"]}
    assert kernels.keys() == LIMITS.keys()
    for name, (most, most_barriers) in LIMITS.items():
        rows = kernels[name]["by_loop"]
        instructions = sum(row["warp_instructions"] for row in rows)
        barriers = sum(row["barriers"] for row in rows)
        print(f"{name}: {instructions:,.0f} warp instructions, {barriers:.0f} barriers per token")
        assert instructions <= most and barriers <= most_barriers
        # where the machine code hides a counter, the count assumes no unrolling, an upper limit
        hidden = [(name, row["loop"]) for row in rows if not row["unrolled"]]
        assert hidden in ([], [("cayley_forward", "take")])
        assert kernels[name]["spill_bytes"] == 0
