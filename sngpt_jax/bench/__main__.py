"""Measurements on the device at hand: `python -m sngpt_jax.bench --config C`, or `bench NAME …`
for another one.
"""

import importlib
from collections.abc import Sequence

from sngpt_jax.base import cli

# modules of this package, each with a `main`
NAMES = ("step", "kernels", "tune", "export", "policies", "scoring")


def main(argv: Sequence[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in NAMES else ("step", argv)
    status: int = importlib.import_module(f"sngpt_jax.bench.{name}").main(rest)
    return status


if __name__ == "__main__":
    cli.run(main)
