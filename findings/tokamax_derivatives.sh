#!/usr/bin/env bash
# tokamax: attention in plain XLA has a gradient and a Hessian, but no jvp and no gradient's gradient.
#
# One would guess: `tokamax.dot_product_attention(implementation="xla")` calls jax's own operations, so
# jax differentiates it in every way. Its documentation says that it extends the interface of
# `jax.nn.dot_product_attention`, which has all derivatives.
# What happens: every implementation is a `jax.custom_vjp`, even one without kernels. `jax.grad` and
# `jax.jvp(jax.grad(...))` agree with jax.nn. `jax.jvp` alone raises a TypeError. The gradient of a
# gradient raises a ValueError about "an operation that does not support reverse-mode autodiff".
# Why it matters: `jax.jacfwd`, `jax.linearize` and a gradient penalty stop working when attention moves
# from jax.nn to tokamax, with the choice of plain XLA too. `jax.hessian` still works, so a test of it
# does not show this.
# Seen with: jax 0.10.2, jaxlib 0.10.2, tokamax 0.0.12, Python 3.11, CPU; the same with jax 0.12.0.1 and
# tokamax 0.0.17 on Python 3.12.
#
# Output:
#   jax 0.10.2 cpu
#   largest difference from jax.nn.dot_product_attention:
#     value: 0.0e+00
#     gradient: 6.0e-08
#     jvp of the gradient: 1.2e-07
#     jvp: TypeError
#     gradient of the gradient: ValueError

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 tokamax==0.0.12
cd "$work"
unset PYTHONPATH XLA_FLAGS
export JAX_PLATFORMS=cpu

"$work/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import tokamax

print("jax", jax.__version__, jax.default_backend())
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
change = jnp.cos(q)


def plain(q):
    return jnp.sin(jax.nn.dot_product_attention(q, k, v, is_causal=True)).sum()


def library(q):
    y = tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    return jnp.sin(y).sum()


WAYS = {
    "value": lambda f: f(q),
    "gradient": lambda f: jax.grad(f)(q),
    "jvp of the gradient": lambda f: jax.jvp(jax.grad(f), (q,), (change,))[1],
    "jvp": lambda f: jax.jvp(f, (q,), (change,))[1],
    "gradient of the gradient": lambda f: jax.grad(lambda q: jnp.vdot(jax.grad(f)(q), change))(q),
}
print("largest difference from jax.nn.dot_product_attention:")
found = {}
for name, way in WAYS.items():
    want = way(plain)
    try:
        found[name] = f"{abs(way(library) - want).max():.1e}"
    except (TypeError, ValueError) as error:
        found[name] = type(error).__name__
    print(f"  {name}: {found[name]}")
if list(found.values())[3:] != ["TypeError", "ValueError"]:
    sys.exit("the behaviour changed: the last two derivatives exist")
if any(float(found[name]) > 1e-5 for name in list(WAYS)[:3]):
    sys.exit("the behaviour changed: the first three results differ")
PY
