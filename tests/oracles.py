"""The compact GPT family in float64 numpy, written from the formulas, and a comparison with jax.

This is the slow and literal form: complex rotation, Python integers, loops over heads. It uses no
function of `sngpt_jax`.
"""

import jax
import jax.numpy as jnp
import numpy as np

# ------------------------------------------------------------------------------ the comparison


def check(jax_fn, numpy_fn, *args, tol=2e-5, directions=3, seed=0):
    """`jax_fn` in float32 equals `numpy_fn` in float64, and so does the gradient of a random
    weighting of its output.

    `args` are pytrees of float arrays. The gradient in each of their leaves is compared with
    central differences of `numpy_fn` along random directions. `tol` is relative to the largest
    value, and to the norm of the leaf's gradient.
    """
    rng = np.random.default_rng(seed)
    paths, tree = jax.tree_util.tree_flatten_with_path(args)
    leaves32 = [jnp.asarray(leaf, jnp.float32) for _, leaf in paths]
    leaves64 = [np.asarray(leaf, np.float64) for leaf in leaves32]
    want = numpy_fn(*tree.unflatten(leaves64))
    weight = rng.normal(size=want.shape)

    def weighted(leaves):
        out = jax_fn(*tree.unflatten(leaves))
        return jnp.vdot(weight.astype(np.float32), out), out

    (_, got), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(leaves32)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max(), err_msg="value")

    def slope(i, direction):
        eps = 1e-5 * max(1.0, np.abs(leaves64[i]).max())

        def at(step):
            moved = [*leaves64[:i], leaves64[i] + step * direction, *leaves64[i + 1 :]]
            return np.vdot(weight, numpy_fn(*tree.unflatten(moved)))

        return (at(eps) - at(-eps)) / (2 * eps)

    for i, ((path, _), grad) in enumerate(zip(paths, grads, strict=True)):
        name = "gradient in argument " + jax.tree_util.keystr(path)
        grad64 = np.asarray(grad, np.float64)
        assert np.all(np.isfinite(grad64)), name
        for direction in rng.normal(size=(directions, *grad64.shape)):
            atol = tol * (np.linalg.norm(grad64) + 0.01)
            np.testing.assert_allclose(
                np.vdot(grad64, direction), slope(i, direction), rtol=0, atol=atol, err_msg=name
            )


# ------------------------------------------------------------------------------ attention


def rms_norm(x, eps=1.1920929e-7):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def ntk_base(base, width, length, trained_len):
    raised = trained_len and length > trained_len
    return base * (length / trained_len) ** (width / (width - 2)) if raised else base


def rotary(x, width, base):
    """Turns the complex number (j, j + width/2) of x [B, T, H, h] by -t · base^(-2j/width)."""
    half, T = width // 2, x.shape[1]
    z = x[..., :half] + 1j * x[..., half:width]
    angle = np.array([[t * base ** (-2 * j / width) for j in range(half)] for t in range(T)])
    z = z * np.exp(-1j * angle)[None, :, None, :]
    return np.concatenate([z.real, z.imag, x[..., width:]], axis=-1)


def attend(q, k, v):
    """Causal softmax(q kᵀ / √h) v; query head i takes key/value head i // (H/K)."""
    _, T, H, h = q.shape
    group = H // k.shape[2]
    out = np.zeros_like(q)
    for head in range(H):
        scores = np.einsum("bth,bsh->bts", q[:, :, head], k[:, :, head // group]) / np.sqrt(h)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, head] = (weights / weights.sum(-1, keepdims=True)) @ v[:, :, head // group]
    return out


def exclude_own_value(y, v):
    """XSA: y - ⟨y, v̂⟩ v̂ with v̂ = v / max(‖v‖, 1e-12), of the same token. arXiv:2603.09078."""
    group = y.shape[2] // v.shape[2]
    out = np.zeros_like(y)
    for head in range(y.shape[2]):
        own = v[:, :, head // group]
        unit = own / np.maximum(np.sqrt(np.sum(own**2, -1, keepdims=True)), 1e-12)
        out[:, :, head] = y[:, :, head] - np.sum(y[:, :, head] * unit, -1, keepdims=True) * unit
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


PROJECTIONS = ("query", "key", "value")


def attention(config, layer, p, u, *, added_v=None, first_v=None):
    """The output of block `layer`'s attention of normalized u, and its values before their mixing.

    `added_v` is the value embedding to add, `first_v` layer 0's values, where there are any.
    """
    B, T, _ = u.shape
    width = config.rope_dims or config.head_dim
    base = ntk_base(config.rope_base, width, T, config.rope_ntk_len)
    q, k, raw_v = ((u @ p[name]).reshape(B, T, -1, config.head_dim) for name in PROJECTIONS)
    q, k = (rotary(rms_norm(x, config.norm_eps), width, base) for x in (q, k))
    q = q * p["q_gain"][:, None]
    if added_v is not None:
        raw_v = raw_v + added_v
    v = raw_v
    if config.value_residual and first_v is not None:
        v = p["value_mix"][0] * first_v + p["value_mix"][1] * raw_v
    y = attend(q, k, v)
    if layer >= config.num_layers - config.xsa_layers:
        y = exclude_own_value(y, v)
    if config.attention_gate:
        y = y * sigmoid(u @ p["gate_weight"] + p["gate_bias"])[..., None]
    return y.reshape(B, T, -1) @ p["out"], raw_v


# ------------------------------------------------------------------------------ MLP, embeddings


def relu2(x):
    return np.where(x > 0, x * x, 0.0)


def leaky_relu2(x):
    """leaky_relu(x, slope 0.5) squared: x² above 0, x²/4 below."""
    return np.where(x > 0, x * x, 0.25 * x * x)


def smear(x, gate, starts=None):
    """(1 - g) x_t + g x_{t-1}, g = σ(gate); x_{t-1} = 0 for t = 0 and where `starts` [B, T]."""
    out = np.zeros_like(x)
    g = sigmoid(gate)
    for t in range(x.shape[1]):
        before = x[:, t - 1] if t else np.zeros_like(x[:, 0])
        if starts is not None:
            before = np.where(starts[:, t, None], 0.0, before)
        out[:, t] = (1 - g) * x[:, t] + g * before
    return out


def _int32(n):
    return (n + 2**31) % 2**32 - 2**31


def hash_xor(tokens, buckets):
    """((36313 x_t) XOR (27191 x_{t-1})) mod (buckets - 1) in int32; the last bucket at t = 0."""

    def of(now, last):
        return (_int32(36313 * now) ^ _int32(27191 * last)) % (buckets - 1)

    rows = np.asarray(tokens).tolist()
    return np.array([[buckets - 1, *map(of, row[1:], row[:-1])] for row in rows])


def hash_sum(tokens, buckets):
    """(2654435761 x_t + 40503 x_{t-1}) mod buckets without overflow, x_{-1} = 0."""

    def of(now, last):
        return (2654435761 * now + 40503 * last) % buckets

    return np.array([list(map(of, row, [0, *row[:-1]])) for row in np.asarray(tokens).tolist()])


def bigram(config, p, tokens):
    index = {"xor": hash_xor, "sum": hash_sum}[config.bigram_hash](tokens, config.bigram_buckets)
    return p["table"][index] @ p["proj"] * p.get("scale", 1.0)


def value_embedding(config, p, tokens):
    """{layer: s_layer · s · E_v[token] P_v as [B, T, K, h]}."""
    shared = p["table"][tokens] @ p["proj"] * p["scale"]
    shared = shared.reshape(*tokens.shape, config.num_kv_heads, config.head_dim)
    return dict(zip(config.value_embed_layers, (s * shared for s in p["layer_scale"]), strict=True))


# ------------------------------------------------------------------------------ initial values


def overtone(table):
    """U S' Vᵀ with S'_k = S_1 / √k, k = 1, 2, …"""
    u, s, vt = np.linalg.svd(table, full_matrices=False)
    return u * (s[0] / np.sqrt(np.arange(1, len(s) + 1))) @ vt


def phase_mix(layer, num_layers):
    """(p, 1 - p) with p = σ(3 (layer/(L-1) - ½))."""
    p = sigmoid(3 * (layer / max(num_layers - 1, 1) - 0.5))
    return np.array([p, 1 - p])


# ------------------------------------------------------------------------------ the whole model


def block(config, layer, p, x, x0, *, added_v=None, first_v=None):
    """Returns the block's output and its values before their mixing."""
    scale = 1 / np.sqrt(layer + 1) if config.ln_scale else 1.0
    u = p["resid_mix"][0] * x + p["resid_mix"][1] * x0
    normed = scale * rms_norm(u, config.norm_eps)
    y, raw_v = attention(config, layer, p["attn"], normed, added_v=added_v, first_v=first_v)
    u = u + p["attn_scale"] * y
    activation = {"relu2": relu2, "leaky_relu2": leaky_relu2}[config.mlp_activation]
    hidden = activation(scale * rms_norm(u, config.norm_eps) @ p["mlp"]["up"])
    return u + p["mlp_scale"] * (hidden @ p["mlp"]["down"]), raw_v


def embed(config, p, tokens):
    """The blocks' first input."""
    x = p["embed"]["table"][tokens]
    if config.bigram_buckets:
        x = x + bigram(config, p["bigram"], tokens)
    starts = tokens == config.bos_id if config.smear_mask_bos else None
    if config.smear == "before_norm":
        x = smear(x, p["smear"]["gate"], starts)
    x = rms_norm(x, config.norm_eps)
    return smear(x, p["smear"]["gate"], starts) if config.smear == "after_norm" else x


def gpt(config, p, tokens):
    """Logits [B, T, V] of parameters `p`, nested as the model's own."""
    x = x0 = embed(config, p, tokens)
    embedded = {}
    if config.value_embed_layers:
        embedded = value_embedding(config, p["value_embed"], tokens)
    encoder, saved, first_v = config.num_layers // 2, [], None

    def apply(layer, x, added_v=None):
        return block(config, layer, p["blocks"][layer], x, x0, added_v=added_v, first_v=first_v)

    for layer in range(config.num_layers):
        if layer == encoder:
            for j, again in enumerate(config.recycle_layers):
                x, _ = apply(again, p["recycle"]["scale"][j] * x + p["recycle"]["bias"][j])
        if layer >= encoder and saved:
            x = x + p["skip_weights"][layer - encoder] * saved.pop()
        x, raw_v = apply(layer, x, embedded.get(layer))
        first_v = raw_v if layer == 0 else first_v
        if layer < encoder:
            saved.append(x)
    logits = rms_norm(x, config.norm_eps) @ p["embed"]["table"].T
    return config.logit_soft_cap * np.tanh(logits / config.logit_soft_cap)
