"""What every check of an audit ends as."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["passed", "failed", "could not be made"]
UNMADE: Outcome = "could not be made"


@dataclass(frozen=True)
class Check:
    """One check. `text` says what was found, or why the check could not be made."""

    name: str
    outcome: Outcome
    text: str
    figures: dict[str, Any] = field(default_factory=dict)  # for --json

    def row(self) -> tuple[str, str]:
        """The check for `terminal.show_result`."""
        joint = ", because " if self.outcome == UNMADE else ": "
        return self.name, f"{self.outcome}{joint}{self.text}"


def unmade(name: str, reason: str) -> Check:
    """A check that could not be made, because of `reason`."""
    return Check(name, UNMADE, reason)


def verdict(name: str, passed: bool, text: str, **figures: Any) -> Check:
    """A check that was made."""
    return Check(name, "passed" if passed else "failed", text, figures)


def exit_status(checks: Sequence[Check]) -> int:
    """1 if a check failed, otherwise 0."""
    return int(any(check.outcome == "failed" for check in checks))
