"""The cases of the kernels' operations, and the options that choose among them."""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import sngpt_kernels
import tyro

from sngpt_jax.base.errors import UserError
from sngpt_jax.config.options import Json

if TYPE_CHECKING:
    from sngpt_kernels.case import Case  # imports jax, which takes seconds

OPERATIONS = tuple(
    module.name for module in pkgutil.iter_modules(sngpt_kernels.__path__) if module.ispkg
)


@dataclass(frozen=True)
class CaseArguments:
    operation: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="[OPERATION ...]",
            help=f"operations to take: {', '.join(OPERATIONS)}; default: all",
            help_behavior_hint="",
        ),
    ] = ()
    case: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME",
            help="take only the case of this name, such as golf_11l_xsa4",
            help_behavior_hint="",
        ),
    ] = ""
    json: Json = ""


@dataclass(frozen=True)
class InspectArguments(CaseArguments):
    # GPU to compile for: a100, h100, h200 or b200; can be repeated; default: a100, h100 and b200
    target: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    first: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # only each operation's first case
    # count the instructions per token by loop; needs nvdisasm
    sass: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def select(arguments: CaseArguments) -> "list[tuple[str, Case]]":
    """(operation, case) of every case that the arguments choose.

    Raises `UserError` if there is no such operation or case.
    """
    found = []
    for operation in arguments.operation or OPERATIONS:
        if operation not in OPERATIONS:
            known = " or ".join(OPERATIONS)
            raise UserError(f"there is no operation {operation!r}; expected {known}")
        cases = importlib.import_module(f"sngpt_kernels.{operation}.specs").CASES
        found += [(operation, case) for case in cases]
    chosen = [pair for pair in found if arguments.case in ("", pair[1].name)]
    if not chosen:
        known = ", ".join(case.name for _, case in found)
        raise UserError(f"--case {arguments.case}: there is none; expected one of: {known}")
    return chosen
