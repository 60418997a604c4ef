"""Whether a run may use the custom kernels that it would choose.

Before a program is traced, process 0 compares each of these kernels with `xla` on random inputs
of the run's own shapes (`sngpt_kernels.parity`). A kernel that is wrong or fails is distrusted, so
the choice falls on another implementation, or the run refuses if the recipe names the kernel. The
verdict is kept in the folder of compiled programs for the same device, driver, jax and kernels.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import sngpt_kernels
from sngpt_kernels import dispatch, parity
from sngpt_kernels.case import Case
from sngpt_kernels.cayley import specs as cayley
from sngpt_kernels.cayley.dictionary import Scheme
from sngpt_kernels.epilogue import specs as epilogue
from sngpt_kernels.mlp import specs as mlp
from sngpt_kernels.rotary import specs as rotary
from sngpt_kernels.stream import specs as stream
from sngpt_kernels.xsa import specs as xsa
from sngpt_kernels.xsa.api import LIBRARIES

from sngpt_jax import __version__
from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import at_home, write_text_atomic
from sngpt_jax.cluster import processes
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.config.file import with_own_cache
from sngpt_jax.model.layers import compute_dtype

logger = logging.getLogger("sngpt_jax")

Mode = Literal["check", "trust", "off"]
Verdicts = dict[str, str]  # by operation: what is wrong with its kernel; empty: nothing

KERNELS = ("pallas_triton", *LIBRARIES)  # the implementations that are compared

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Operation:
    """An operation with custom kernels, as a model uses it."""

    # its calls in one microbatch of so many sequences of so many tokens
    cases: Callable[[ModelConfig, int, int], list[Case]]
    named: Callable[[ModelConfig], str] = lambda _: "auto"  # the implementation in the recipe


def _attention(config: ModelConfig, sequences: int, length: int) -> list[Case]:
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    dtype = compute_dtype(config)
    name = f"{dtype} {[length, *heads]}"
    # the exclusion is the epilogue's
    return [xsa.case(name, sequences, length, *heads, exclusive=False, dtype=dtype)]


def _rotary(config: ModelConfig, sequences: int, length: int) -> list[Case]:
    if not config.qk_norm or config.positions != "rotary":
        return []
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    dtype, turned, gated = compute_dtype(config), config.rotary_dims, config.attention_gate
    name = f"{dtype} {[length, *heads, turned]}{' gated' * gated}"
    case = functools.partial(rotary.case, name, sequences, length, *heads)
    return [case(rotary=turned, gated=gated, dtype=dtype)]


def _stream(config: ModelConfig, sequences: int, length: int) -> list[Case]:
    compact = config.family == "compact"
    dtype, width = compute_dtype(config), config.d_model
    return [
        stream.case(
            f"{dtype} {width}{' mixed' * weighted}{' with a gain' * (not compact)}",
            *(sequences * length, width),
            weighted=weighted,
            gain=not compact,
            shared=True,
            dtype=dtype,
        )
        for weighted in ((False, True) if compact else (False,))
    ]


def _epilogue(config: ModelConfig, sequences: int, length: int) -> list[Case]:
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    gated, dtype = config.attention_gate, compute_dtype(config)
    plain = config.xsa_layers < config.num_layers
    found = []
    for exclusive in (True,) * (config.xsa_layers > 0) + (False,) * (gated and plain):
        name = f"{dtype} {[length, *heads]}{' exclusive' * exclusive}{' gated' * gated}"
        parts = {"exclusive": exclusive, "gated": gated}
        found.append(epilogue.case(name, sequences, length, *heads, **parts, dtype=dtype))
    return found


def _mlp(config: ModelConfig, sequences: int, length: int) -> list[Case]:
    activation = config.mlp_activation
    if config.family != "compact" or activation == "gelu":
        return []
    dtype, widths = compute_dtype(config), (config.d_model, config.mlp_dim)
    name = f"{dtype} {[*widths]} {activation}"
    return [mlp.case(name, sequences * length, *widths, activation=activation, dtype=dtype)]


def _code(config: ModelConfig, sequences: int, length: int) -> list[Case]:
    if not config.levels:
        return []
    levels = tuple((n, k, degree) for n, k, degree in config.levels)
    scheme = Scheme(levels, config.forward_standardized, config.generators)
    dtype = compute_dtype(config)
    return [cayley.case(f"{dtype} {scheme}", scheme, dtype, sequences * length)]


# by the package in sngpt_kernels; a new operation joins by a row
OPERATIONS: Mapping[str, Operation] = {
    "xsa": Operation(_attention, lambda config: config.attention),
    # attention that is named xla runs no kernel after it
    "epilogue": Operation(_epilogue, lambda config: "xla" if config.attention == "xla" else "auto"),
    "rotary": Operation(_rotary, lambda config: config.rotary),
    "stream": Operation(_stream, lambda config: config.stream),
    "mlp": Operation(_mlp, lambda config: config.mlp),
    "cayley": Operation(_code, lambda config: config.code),
}


def settle(config: Config, tokens: int, mode: Mode) -> Verdicts:
    """Decides which kernels the programs that are traced from now on may use.

    Every process calls it before it traces a program. Only process 0 compares.

    Args:
      config: the recipe. Its implementations and its folder of compiled programs are read.
      tokens: in one device's microbatch, whole sequences of `data.seq_len`.
      mode: `check` compares; `trust` uses every kernel; `off` uses none.

    Returns: the verdicts on the kernels that would be chosen; none without a comparison.
    """
    for name in OPERATIONS:
        dispatch.distrust(name, "--kernels off" if mode == "off" else "")
    if mode != "check":
        return {}
    verdicts = processes.broadcast(lambda: _verdicts(config, tokens))
    for name, problem in verdicts.items():
        dispatch.distrust(name, problem)
    return verdicts


def settle_own(config: Config, mode: Mode = "check") -> Verdicts:
    """`settle` for a trained model, whose file does not choose the folder of verdicts."""
    return settle(with_own_cache(config), config.eval.device_batch_tokens, mode)


def report_changes(before: object, now: Verdicts) -> None:
    """Logs the kernels whose verdict is another than at the run's last start.

    `before` are the verdicts of that start, or what a file holds in their place.
    """
    for name, problem in now.items():
        old = before.get(name) if isinstance(before, dict) else None
        if old is not None and bool(old) != bool(problem):
            logger.warning(
                f"{name}: the verdict on its kernel has changed since the run's last"
                f" start, from {old or 'right'} to {problem or 'right'}; the run goes on with"
                f" {'another implementation' if problem else 'the kernel'}"
            )


def _verdicts(config: Config, tokens: int) -> Verdicts:
    folder, found = config.train.compilation_cache, Verdicts()
    length = min(config.data.seq_len, tokens)
    for name, operation in OPERATIONS.items():
        named = operation.named(config.model)
        for case, kernel in _chosen(operation, config.model, tokens // length, length, named):
            path = _path(Path(at_home(folder)), name, kernel, case) if folder else None
            problem = _kept(path)
            if problem is None:
                problem = _compared(name, kernel, case)
                _keep(path, name, kernel, case, problem)
            where = f"report it as CONTRIBUTING.md says, with {path or 'this line'}"
            if problem:
                logger.warning(f"{name}: {kernel} is not used: {problem}; {where}")
            found[name] = found.get(name) or problem
    return found


def _chosen(
    operation: Operation, config: ModelConfig, sequences: int, length: int, named: str
) -> list[tuple[Case, str]]:
    """The operation's calls that would run as a custom kernel on the current device, and which."""
    found = []
    with contextlib.suppress(dispatch.CannotServe):
        dispatch.check_nvidia("pallas_triton", dispatch.current_device())
        for case in operation.cases(config, sequences, length):
            run = functools.partial(case.run, implementation=None if named == "auto" else named)
            # the comparison or the model's own trace says what fails
            with dispatch.recorded_choices() as choices, contextlib.suppress(Exception):
                jax.eval_shape(run, *case.abstract())
            # later choices are of operations inside it
            found += [(case, choice) for choice in choices[:1] if choice in KERNELS]
    return found


def _compared(name: str, kernel: str, case: Case) -> str:
    """What is wrong with the kernel; empty if nothing is."""
    start, key = time.perf_counter(), jax.random.key(secrets.randbits(32))
    try:
        result = parity.compare(case, kernel, key, rows=parity.rows_within(case))
    except Exception as error:  # a kernel may fail in any way, and the run can do without it
        first = str(error).strip().partition("\n")[0]
        return f"it fails with {type(error).__name__}: {first[:200]}"
    if not result.problem:
        largest = max(one.error for one in result.differences)
        seconds = time.perf_counter() - start
        logger.info(f"{name}: {kernel} equals xla within {largest:.1e} ({seconds:.1f} s)")
    return result.problem


# ---------------------------------------- kept verdicts


@functools.cache
def _sources() -> str:
    """A digest of the kernels' sources, which change without the version in a checkout."""
    digest, folder = hashlib.sha256(), Path(sngpt_kernels.__path__[0])
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _facts(name: str, kernel: str, case: Case) -> dict[str, str]:
    """What a verdict depends on."""
    device = jax.local_devices()[0]
    return {
        "operation": name,
        "implementation": kernel,
        "case": case.name,
        "device": device.device_kind,
        "platform": " ".join(device.client.platform_version.split()),
        "driver": _DRIVER.read_text().partition("\n")[0] if _DRIVER.is_file() else "",
        "jax": f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}",
        "sngpt_jax": __version__,
        "kernels": _sources(),
    }


def _path(folder: Path, name: str, kernel: str, case: Case) -> Path:
    digest = hashlib.sha256(json.dumps(_facts(name, kernel, case)).encode()).hexdigest()
    return folder / "kernels" / f"{name}-{digest[:32]}.json"


def _kept(path: Path | None) -> str | None:
    """The verdict in `path`; None if there is none that can be read."""
    if path is None or not path.is_file():
        return None
    with contextlib.suppress(UserError, KeyError, TypeError):
        problem = typed_json.read(path, UserError)["problem"]
        return problem if isinstance(problem, str) else None
    return None


def _keep(path: Path | None, name: str, kernel: str, case: Case, problem: str) -> None:
    if path is None:
        return
    try:
        write_text_atomic(
            path, json.dumps(_facts(name, kernel, case) | {"problem": problem}, indent=1)
        )
    except OSError as error:  # the run needs no kept verdict, as it needs no kept program
        logger.warning(f"{path}: {error.strerror}; the next start compares the kernel again")
