"""The health of the sparse codes: which features fire, how strongly, and how well they rebuild
their input.

Over N tokens, for each layer and level with the features V:

    dead        share of V selected fewer than C · N · k / |V| times, C = 1/10
    silent      share of V selected in no sample of the last 100 optimizer steps
    zombies     share of V that is not dead and whose mean activation is below a tenth of the
                median over V without the dead
    reachable   features that are a child of some parent; at level 0 all
    mu_mean     mean over V of |<m, v_f>|, where m is the scores' running mean
    sigma_mean  mean over V of the scores' running standard deviation
    min_z       smallest standardized score of any selected feature, without its bias
    duplicates  candidates per token that an earlier parent of the token had already brought

and for each layer

    cos           mean cosine between a code's input x and its reconstruction x̂
    cos_centered  the same between x - m and x̂: the code leaves the mean m out by design
    rms           root of the mean square of x̂'s coordinates
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sngpt_kernels.cayley import dictionary, xla

from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.data.shards import TokenStream
from sngpt_jax.evaluation.step import on_each_device
from sngpt_jax.evaluation.windows import (
    OnProgress,
    WindowBatch,
    read_windows,
    rows_at_a_time,
    standard_windows,
)
from sngpt_jax.model.cayley import CodeState, Taps, activations, code_state
from sngpt_jax.model.forward import Batch, Variables, tapped_losses

RARE = 10  # 1 / C, and the median over the strength of a zombie
SILENT_STEPS = 100


class Sums(NamedTuple):
    """Sums over tokens of L layers with F features each. One layer's sums lack the dimension L."""

    tokens: Any  # [L], number of tokens N
    counts: Any  # [L, F], tokens that selected the feature
    activations: Any  # [L, F]
    min_z: Any  # [L, levels]
    repeats: Any  # [L, levels], parents whose children an earlier parent of the token has too
    cos: Any  # [L]
    cos_centered: Any  # [L]
    mean_square: Any  # [L]


def _repeats(parents_PK: jax.Array, group_of_parent: np.ndarray) -> jax.Array:
    # parents of one group have equal children
    group_PK = jnp.sort(jnp.asarray(group_of_parent)[parents_PK], axis=-1)
    return jnp.sum(group_PK[:, 1:] == group_PK[:, :-1], dtype=jnp.int32)


def _cosines(a_PD: jax.Array, b_PD: jax.Array) -> jax.Array:
    """[P]; 0 for a vector of zeros."""
    lengths_P = jnp.linalg.norm(a_PD, axis=-1) * jnp.linalg.norm(b_PD, axis=-1)
    return jnp.sum(a_PD * b_PD, axis=-1) / jnp.maximum(lengths_P, 1e-30)


def layer_sums(config: ModelConfig, taps: Taps, code: CodeState, counted_B: jax.Array) -> Sums:
    """The sums of a layer, whose `taps` and `code` lack the dimension L, over the counted rows."""
    levels, generators = config.levels, config.generators
    # where a level's ids end and the next one's begin
    splits = np.cumsum([k for _, k, _ in levels])[:-1].tolist()
    above = range(1, len(levels))
    groups = [dictionary.children(levels, generators, i).group_of_parent for i in above]

    # one row at a time, to save memory
    def row(total: Sums, row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, None]:
        x_PD, ids_PA, counted = row[0].astype(jnp.float32), *row[1:]
        z_PA, c_PA = activations(config, Taps(x_PD, ids_PA), code)
        x_hat_PD = xla.combine(c_PA, ids_PA, config.d_model)
        ids = ids_PA.reshape(-1)
        lowest = [jnp.min(z) for z in jnp.split(z_PA, splits, axis=-1)]
        repeats = map(_repeats, jnp.split(ids_PA, splits, axis=-1), groups)
        after = Sums(
            tokens=total.tokens + len(ids_PA),
            counts=total.counts.at[ids].add(1),
            activations=total.activations.at[ids].add(c_PA.reshape(-1)),
            min_z=jnp.minimum(total.min_z, jnp.stack(lowest)),
            repeats=total.repeats + jnp.stack([jnp.int32(0), *repeats]),
            cos=total.cos + jnp.sum(_cosines(x_PD, x_hat_PD)),
            cos_centered=total.cos_centered + jnp.sum(_cosines(x_PD - code.mean[None], x_hat_PD)),
            mean_square=total.mean_square + jnp.sum(jnp.mean(jnp.square(x_hat_PD), axis=-1)),
        )
        return jax.tree.map(lambda new, old: jnp.where(counted, new, old), after, total), None

    zeros = jnp.zeros(code.std.shape)
    zero, no_repeats = jnp.float32(0), jnp.zeros(len(levels), jnp.int32)
    min_z = jnp.full(len(levels), jnp.inf)
    start = Sums(jnp.int32(0), zeros.astype(jnp.int32), zeros, min_z, no_repeats, *[zero] * 3)
    return jax.lax.scan(row, start, (*taps, counted_B))[0]


def make_health_step(config: ModelConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted function (variables, batch of "inputs" and "targets" [B, T] and "counted" rows,
    bool [B]) → `Sums`, in all processes.
    """

    def sums(variables: Variables, batch: Batch) -> Sums:
        everywhere = jnp.arange(batch["inputs"].shape[1])
        # the losses are unused, so the compiler removes the last MLP and the head
        _, taps = tapped_losses(config)(variables, batch["inputs"], batch["targets"], everywhere)
        assert taps is not None
        local = jax.lax.map(
            lambda layer: layer_sums(config, layer[0], layer[1], batch["counted"]),
            (taps, code_state(variables)),
        )
        return jax.lax.psum(local, BATCH_AXES)._replace(min_z=jax.lax.pmin(local.min_z, BATCH_AXES))

    return on_each_device(config, mesh, sums)


_all_scores = jax.jit(xla.all_scores, static_argnums=1)


def is_dead(counts: np.ndarray, tokens: int, k: int) -> np.ndarray:
    """Which features of a level are dead, by their int64 `counts` [..., |V|]."""
    # in integers, so that a feature at the threshold is alive
    return RARE * counts * counts.shape[-1] < tokens * k


NOTHING = Sums(0, 0, 0, np.inf, 0, 0, 0, 0)


def accumulate(total: Sums, batch: Sums) -> Sums:
    """`total`, `NOTHING` before the first batch, plus the sums of a batch, in int64 and float64."""
    wide = {"i": np.int64, "f": np.float64}
    host = Sums(*(a.astype(wide[a.dtype.kind]) for a in map(np.asarray, batch)))
    return Sums(*map(np.add, total, host))._replace(min_z=np.minimum(total.min_z, host.min_z))


@dataclass(frozen=True)
class Health:
    """The quantities of the module's docstring, [L, levels], or [L] for those of a layer."""

    tokens: int  # N
    dead: np.ndarray
    silent: np.ndarray  # NaN before the first step
    zombies: np.ndarray
    reachable: np.ndarray
    mu_mean: np.ndarray
    sigma_mean: np.ndarray
    min_z: np.ndarray
    duplicates: np.ndarray
    cos: np.ndarray
    cos_centered: np.ndarray
    rms: np.ndarray

    def record(self) -> dict[str, float]:
        """Metrics such as `code/layer00/level0/dead`; names without a layer are means."""
        arrays = dict(vars(self))
        found: dict[str, float] = {"code/tokens": arrays.pop("tokens")}
        for name, array in arrays.items():
            places = {f"layer{layer:02d}/": row for layer, row in enumerate(array)}
            for place, values in {"": array.mean(axis=0), **places}.items():
                if not values.ndim:
                    found[f"code/{place}{name}"] = float(values)
                    continue
                for level, value in enumerate(values):
                    found[f"code/{place}level{level}/{name}"] = float(value)
        return found

    def line(self) -> str:
        """`code │ dead 0.0/0.3/2.1 % │ silent … │ zombies … │ cos 0.83, 0.90 centered`: means over
        layers, per level.
        """

        def text(share: float) -> str:
            if 0 < share < 0.05:  # a share above zero must not read as zero
                return "<0.1"
            return f"{share:.1f}" if math.isfinite(share) else "–"

        shares = {"dead": self.dead, "silent": self.silent, "zombies": self.zombies}
        parts = (
            f"{name} {'/'.join(map(text, 100 * share.mean(axis=0)))} %"
            for name, share in shares.items()
        )
        cosines = f"cos {self.cos.mean():.2f}, {self.cos_centered.mean():.2f} centered"
        return " │ ".join(["code", *parts, cosines])


def summarize(config: ModelConfig, code: CodeState, sums: Sums, step: int) -> Health:
    """The health of codes after `step` optimizer steps, with the `sums` of `accumulate`."""
    levels, generators, tokens = config.levels, config.generators, int(sums.tokens[0])
    mu_LF = np.abs(np.asarray(_all_scores(code.mean, levels[-1][0])))
    std_LF, last_fired_LF = np.asarray(code.std), np.asarray(code.last_fired)

    def of_level(level: int) -> dict[str, np.ndarray]:
        ids = dictionary.level_range(levels, level)
        V = slice(ids.start, ids.stop)
        counts, activations = sums.counts[:, V], sums.activations[:, V]
        dead = is_dead(counts, tokens, levels[level][1])
        strength = np.where(dead, np.nan, activations / np.maximum(counts, 1))
        alive = [row[~rare] for row, rare in zip(strength, dead, strict=True)]
        median_L = np.array([np.median(row) if len(row) else np.nan for row in alive])
        silent = (last_fired_LF[:, V] <= max(step - SILENT_STEPS, 0)).mean(axis=1)
        reachable = float(dictionary.reachable(levels, level, generators))
        members = len(dictionary.children(levels, generators, level).steps) if level else 0
        return {
            "dead": dead.mean(axis=1),
            "silent": silent if step else np.full(len(counts), np.nan),  # no step yet
            "zombies": np.mean(RARE * strength < median_L[:, None], axis=1),
            "reachable": np.full(len(counts), reachable),
            "mu_mean": mu_LF[:, V].mean(axis=1, dtype=np.float64),
            "sigma_mean": std_LF[:, V].mean(axis=1, dtype=np.float64),
            "min_z": sums.min_z[:, level],
            "duplicates": sums.repeats[:, level] * members / tokens,
        }

    found = [of_level(level) for level in range(len(levels))]
    by_name = {name: np.stack([values[name] for values in found], axis=1) for name in found[0]}
    means = {name: getattr(sums, name) / tokens for name in ("cos", "cos_centered")}
    return Health(tokens=tokens, **by_name, **means, rms=np.sqrt(sums.mean_square / tokens))


def score_health(
    config: Config,
    variables: Variables,
    health_step: Callable[[Variables, Batch], Sums],
    stream: TokenStream,
    mesh: Mesh,
    *,
    step: int,
    progress: OnProgress | None = None,
) -> Health:
    """The health of a model's codes after `step` optimizer steps, over as many windows from the
    start of `stream` as `eval.health_tokens` holds, at least one.
    """
    seq_len = config.data.seq_len
    windows = standard_windows(len(stream), seq_len, max(config.eval.health_tokens, seq_len))
    rows = rows_at_a_time(windows, config.eval.device_batch_tokens, mesh.devices.size)
    place = batch_placer(mesh)

    def dispatch(batch: WindowBatch) -> Sums:
        return health_step(variables, place({**batch.arrays, "counted": batch.counted}))

    total = NOTHING
    for sums, _ in read_windows(stream, windows, rows, dispatch, progress):
        total = accumulate(total, sums)
    code = jax.jit(code_state, out_shardings=NamedSharding(mesh, P()))(variables)
    return summarize(config.model, code, total, step)
