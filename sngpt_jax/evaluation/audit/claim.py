"""Which byte count the numbers of a claim imply, and which known mistake explains it.

A loss L in nats per token and a score B in bits per byte give the bytes per token,

    bytes / tokens = L / (ln 2 · B)

up to the rounding of the two printed numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.audit.check import Check, unmade, verdict
from sngpt_jax.evaluation.audit.published import REPORTED_TO, Count, Mistake

EXACT = 1e-7  # relative error of counts that are known or recomputed
COARSE = 0.01  # relative error from which a fit to the right count says little
ENDS = 1e-5  # relative error if nobody says how many tokens were scored at the end of the stream
# Relative to the mean, a token stands for between none and four times as many bytes. Each token
# more or less therefore changes the mean by at most three times its share.
TOKEN_SPREAD = 3.0
ACCUMULATORS = 8  # the challenge's processes, each of which adds up its own bytes


@dataclass(frozen=True)
class Printed:
    """A number as somebody printed it."""

    value: float
    half: float  # half a unit of the last printed digit

    @classmethod
    def parse(cls, text: str, option: str) -> "Printed":
        """Reads the number above 0 that `option` gives. Raises `UserError`."""
        try:
            number = Decimal(text)
        except InvalidOperation:
            number = Decimal("nan")
        exponent = number.as_tuple().exponent
        if not isinstance(exponent, int) or number <= 0 or not 1e-30 < number < 10**30:
            raise UserError(f"{option} {text!r}: expected a number above 0, such as 1.1554")
        return cls(float(number), 0.5 * 10.0**exponent)

    @property
    def relative(self) -> float:
        return self.half / self.value


@dataclass(frozen=True)
class Claim:
    """The numbers of a claim."""

    loss: Printed  # nats per token
    bpb: Printed  # bits per byte
    tokens: int | None  # scored targets

    @property
    def per_token(self) -> float:
        """Implied bytes per token."""
        return self.loss.value / (math.log(2) * self.bpb.value)

    @property
    def rounding(self) -> float:
        """Relative error of `per_token` by the printed digits."""
        return self.loss.relative + self.bpb.relative


def float32_sums(right: Count, stride: int) -> list[Mistake]:
    """Bytes added up in float32, window after window of `stride` targets, in each of 8 processes.

    Above 2^24 a sum is rounded to a multiple of its unit u. Adding an integer then has an error of
    variance (u² + 2) / 12, and the errors are independent. The range is 4 standard deviations. Up
    to 2^24 a sum is exact, and there is no such mistake.
    """
    step = right.per_token * stride
    own, variance, unit = right.bytes / ACCUMULATORS, 0.0, 2
    while own > (begins := 2**23 * unit):
        additions = (min(own, 2 * begins) - begins) / step
        variance += ACCUMULATORS * additions * (unit**2 + 2) / 12
        unit *= 2
    radius = 4 * math.sqrt(variance) / right.bytes
    name, origin = "the bytes are summed in float32", "within the rounding of such sums"
    return [Mistake(name, 1 - radius, 1 + radius, origin)] if radius else []


def meets(ratio: float, error: float, low: float = 1.0, high: float = 1.0) -> bool:
    """Whether `ratio` with the relative `error` meets the range from `low` to `high`."""
    return low * (1 - error) <= ratio <= high * (1 + error)


def tolerance(claim: Claim, right: Count) -> float:
    """Relative error of the ratio implied : right, without the rounding of the claim's numbers."""
    if claim.tokens is None:
        return EXACT + ENDS
    return EXACT + TOKEN_SPREAD * abs(claim.tokens - right.tokens) / right.tokens


def judge_bytes(
    claim: Claim, right: Sequence[Count], recomputed: Iterable[Mistake], reported: Iterable[Mistake]
) -> Check:
    """Compares the implied byte count with the right ones, and then with the mistakes. Ratios are
    to the first of the right counts.
    """
    first = right[0]
    ratio, error = claim.per_token / first.per_token, claim.rounding + tolerance(claim, first)
    wider = dict.fromkeys(recomputed, error) | dict.fromkeys(reported, error + REPORTED_TO)
    found = [m for m, within in wider.items() if meets(ratio, within, m.low, m.high)]
    same = [count for count in right if meets(claim.per_token / count.per_token, error)]
    names = "; ".join(f"{mistake.name} ({mistake.origin})" for mistake in found)
    if same and error > COARSE:
        return unmade("bytes", f"the numbers have too few digits: ± {100 * error:.2g} %")
    if same:
        text = f"the implied count is that of {same[0].what}"
        text += f"; so many digits do not rule this out: {names}" if found else ""
    else:
        off = f"{100 * (ratio - 1):+.4g} % ± {100 * error:.2g} %"
        text = f"{off}; {names or 'no known mistake explains it'}"
    mistakes = [mistake.name for mistake in found]
    return verdict("bytes", bool(same), text, ratio=ratio, tolerance=error, mistakes=mistakes)


def judge_tokens(claim: Claim, right: Count, seq_len: int, stride: int) -> Check:
    """Whether the targets are those of the whole stream or of its whole windows, each once."""
    if claim.tokens is None:
        return unmade("tokens", "the number of scored tokens is not given; add --tokens")
    if not right.stream:
        if claim.tokens == right.tokens:
            return verdict("tokens", True, f"as many as are known of {right.what}")
        return unmade("tokens", f"the length of the stream is not known, only {right.tokens:,}")
    every, again = right.stream - 1, seq_len - stride
    whole = every // seq_len * seq_len
    if claim.tokens == every:
        return verdict("tokens", True, "all targets of the stream, each once")
    if claim.tokens == whole:
        return verdict("tokens", True, f"whole windows of {seq_len} tokens, each target once")
    if claim.tokens == whole + again:
        text = (
            f"{again:,} more than whole windows of {seq_len} have: windows of stride {stride} that"
            " overrun the end score the last targets again"
        )
    elif claim.tokens > every:
        text = f"{claim.tokens - every:,} more targets than the stream has"
    else:
        text = f"the claim scores {claim.tokens:,} of the stream's {every:,} targets"
    return verdict("tokens", False, text)


def figures(claim: Claim, right: Count) -> dict[str, float]:
    """What the numbers imply. `corrected_bpb` is the claimed loss over the right bytes."""
    tokens = right.tokens if claim.tokens is None else claim.tokens
    return {
        "tokens": tokens,
        "implied_bytes": claim.per_token * tokens,
        "implied_bytes_error": claim.per_token * tokens * claim.rounding,
        "implied_bytes_per_token": claim.per_token,
        "right_bytes": right.per_token * tokens,
        "right_bytes_per_token": right.per_token,
        "ratio": claim.per_token / right.per_token,
        "corrected_bpb": claim.loss.value / (math.log(2) * right.per_token),
    }


def rows_of(found: Mapping[str, float], right: Count) -> list[tuple[str, str]]:
    """`figures` for a person."""
    implied = (
        "{implied_bytes:,.0f} bytes ± {implied_bytes_error:,.0f} for {tokens:,} tokens,"
        " {implied_bytes_per_token:.7f} per token"
    )
    expected = f"{{right_bytes:,.0f}} bytes, {{right_bytes_per_token:.7f}} per token: {right.what}"
    return [
        ("implied", implied.format(**found)),
        ("right", expected.format(**found)),
        ("ratio", "{ratio:.7f}".format(**found)),
        (
            "corrected",
            "{corrected_bpb:.6f} bits/byte: the claimed loss over the right bytes".format(**found),
        ),
    ]
