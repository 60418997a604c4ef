"""The operation as two Pallas Triton kernels, one pass over memory in each direction.

A program takes some positions of all heads. With s = ⟨y, v⟩ / n and n = max(|v|², floor), the
output is g (y - s v). From its cotangent c and t = ⟨g c, v⟩ / n follow the gradients g c - t v of
y and 2 s t v - t y - s g c of v. Below the floor n is constant, so the first term of v's is absent.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl

from sngpt_kernels import dispatch
from sngpt_kernels.epilogue.api import OPERATION, Gate, tuned_entry
from sngpt_kernels.launch import launch
from sngpt_kernels.tiles import Config as Config
from sngpt_kernels.tiles import dot, exist, load, spans, store

MIN_SQUARE = 1e-24  # the least |v|²: the square of the floor 1e-12 of the norm


@dataclass(frozen=True)
class Problem:
    """The static arguments of one call, for both kernels."""

    shape: tuple[int, ...]  # [B, T, H, h]
    groups: int  # K, the value heads; H without an exclusion
    exclusive: bool
    gated: bool
    config: Config
    interpret: bool

    def head(self, ref: Any, head: Array, existing: Array | None) -> list[Array]:
        """The spans of a head."""
        return [load(ref.at[:, head, part], existing) for part in spans(0, self.shape[3])]

    def write(self, ref: Any, head: Array, parts: list[Array], existing: Array | None) -> None:
        """Writes the spans of a head."""
        for columns, values in zip(spans(0, self.shape[3]), parts, strict=True):
            store(ref.at[:, head, columns], values, existing)

    def gate(self, refs: dict[str, Any], head: Array, existing: Array | None) -> Array | float:
        """sigmoid(logits + bias) of a head, [rows, 1]; 1 without a gate."""
        if not self.gated:
            return 1.0
        own = None if existing is None else existing[:, 0]
        logits = load(refs["logits"].at[:, head], own) + refs["bias"][head]
        return (1 / (1 + jnp.exp(-logits)))[:, None]

    def launch(self, name: str, kernel: Any, inputs: Any, results: Any) -> Any:
        """Runs `kernel`, which finds its arguments by the names in `inputs` and `results`."""
        (B, T, H, h), rows = self.shape, self.config.rows
        names = [*inputs, *results]

        def spec(name: str, array: Any) -> pl.BlockSpec:
            """The program's rows of [B, T, …], its own row of [B, programs, H], or all of [H]."""
            if name == "bias":
                return pl.BlockSpec((H,), lambda i, b: (0,))
            if name == "dbias":
                return pl.BlockSpec((None, None, H), lambda i, b: (b, i, 0))
            rest = array.shape[2:]
            return pl.BlockSpec((None, rows, *rest), lambda i, b: (b, i, *(0 for _ in rest)))

        outputs = launch(
            name,
            lambda *refs: kernel(dict(zip(names, refs, strict=True)), self),
            (pl.cdiv(T, rows), B),
            tuple(inputs.values()),
            tuple(results.values()),
            flops=8 * B * T * H * h,
            transcendentals=B * T * H,
            num_warps=self.config.num_warps,
            interpret=self.interpret,
            in_specs=[spec(*item) for item in inputs.items()],
            out_specs=tuple(spec(*item) for item in results.items()),
        )
        return dict(zip(results, outputs, strict=True))


def _forward_kernel(refs: dict[str, Any], problem: Problem) -> None:
    T, H = problem.shape[1:3]
    existing, group = exist(T, problem.config.rows), H // problem.groups

    @pl.loop(0, problem.groups)
    def _group(k: Array) -> None:
        own = problem.head(refs["v"], k, existing) if problem.exclusive else []
        inverse = 1 / jnp.maximum(dot(own, own), MIN_SQUARE) if own else 0.0

        @pl.loop(0, group)
        def _head(g: Array) -> None:
            head = k * group + g
            y = problem.head(refs["y"], head, existing)
            if own:
                share = dot(y, own) * inverse
                y = [part - share * v for part, v in zip(y, own, strict=True)]
            gate = problem.gate(refs, head, existing)
            problem.write(refs["out"], head, [part * gate for part in y], existing)


def _backward_kernel(refs: dict[str, Any], problem: Problem) -> None:
    T, H = problem.shape[1:3]
    existing, group = exist(T, problem.config.rows), H // problem.groups

    @pl.loop(0, problem.groups)
    def _group(k: Array) -> None:
        own = problem.head(refs["v"], k, existing) if problem.exclusive else []
        square = dot(own, own) if own else jnp.ones((1, 1))
        inverse = 1 / jnp.maximum(square, MIN_SQUARE)

        def one(g: Array, dv: list[Array]) -> list[Array]:
            head = k * group + g
            y, c = (problem.head(refs[name], head, existing) for name in ("y", "dout"))
            gate = problem.gate(refs, head, existing)
            dgate = dot(c, y) if problem.gated else None
            dy = [part * gate for part in c]
            if own:
                share, along = dot(y, own) * inverse, dot(c, own)
                dgate = dgate - share * along if dgate is not None else None
                turned = along * gate * inverse
                both = jnp.where(square > MIN_SQUARE, 2 * share, 0.0) * turned
                parts = zip(dv, own, y, dy, strict=True)
                dv = [d + both * v - turned * a - share * b for d, v, a, b in parts]
                dy = [part - turned * v for part, v in zip(dy, own, strict=True)]
            problem.write(refs["dy"], head, dy, existing)
            if dgate is not None:
                dlogits = (dgate * gate * (1 - gate))[:, 0]
                rows_exist = None if existing is None else existing[:, 0]
                store(refs["dlogits"].at[:, head], dlogits, rows_exist)
                refs["dbias"][head] = jnp.sum(dlogits)
            return dv

        dv = lax.fori_loop(0, group, one, [jnp.zeros_like(v) for v in own])
        if own:
            problem.write(refs["dv"], k, dv, existing)


Arrays = dict[str, Array]


def _like(array: Array) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(array.shape, array.dtype)


def _forward(problem: Problem, arrays: Arrays) -> Array:
    results = {"out": _like(arrays["y"])}
    done = problem.launch("epilogue_forward", _forward_kernel, arrays, results)
    return done["out"]


def _backward(problem: Problem, arrays: Arrays, cotangent: Array) -> Arrays:
    """The gradients. Each program sums the bias's gradient over its rows."""
    results = {f"d{name}": _like(arrays[name]) for name in arrays if name != "bias"}
    if problem.gated:
        B, T, H, _ = problem.shape
        sums = B, pl.cdiv(T, problem.config.rows), H
        results["dbias"] = ShapeDtypeStruct(sums, jnp.float32)
    inputs = {**arrays, "dout": cotangent}
    done = problem.launch("epilogue_backward", _backward_kernel, inputs, results)
    if problem.gated:
        done["dbias"] = jnp.sum(done["dbias"], axis=(0, 1))
    return {name: done[f"d{name}"] for name in arrays}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _finish(arrays: Arrays, problem: Problem) -> Array:
    return _forward(problem, arrays)


def _finish_forward(arrays: Arrays, problem: Problem) -> tuple[Array, Arrays]:
    forward = functools.partial(_forward, problem)
    return dispatch.without_derivative(OPERATION, forward)(arrays), arrays


def _finish_backward(problem: Problem, arrays: Arrays, cotangent: Array) -> tuple[Arrays]:
    gradients = functools.partial(_backward, problem)
    return (dispatch.without_derivative(OPERATION, gradients)(arrays, cotangent),)


_finish.defvjp(_finish_forward, _finish_backward)


def finish(
    y: Array,
    v: Array | None,
    gate: Gate | None,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """`api.finish` of valid arguments, with `v`, `gate` or both. `interpret` serves any device."""
    exclusive, gated = v is not None, gate is not None
    if config is None:
        device = dispatch.current_device()
        entry = tuned_entry(device, y.dtype, y.shape[-1], exclusive, gated)
        config = Config(**entry["config"]) if "config" in entry else Config.heuristic()
    arrays = {"y": y}
    if v is not None:
        arrays["v"] = v
    if gate is not None:
        arrays["logits"], arrays["bias"] = gate
    groups = v.shape[2] if v is not None else y.shape[2]
    return _finish(arrays, Problem(y.shape, groups, exclusive, gated, config, interpret))
