"""An oracle of the compact GPTs: their forward pass in numpy float64, over the tensors of the original PyTorch scripts.

It shares no code with the package's model and no layout either: names and [out, in] matrices are the scripts' own. In `banked`
checkpoints the blocks' matrices are stacked into four tensors; in `plain` ones each is a tensor of its own. Which techniques
are on follows from the `ModelConfig`.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from sngpt_jax.config import ModelConfig

Dialect = Literal["plain", "banked"]
State = dict[str, np.ndarray]


def logits(state: Mapping[str, np.ndarray], config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Soft-capped logits [B, T, V] of `tokens` [B, T], all in float64."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in state.items()}
    x = x0 = embed(w, config, tokens)
    values: list[np.ndarray] = []  # layer 0's, once it has run

    def block(i: int, x: np.ndarray, value_embedding: np.ndarray | None) -> np.ndarray:
        return apply_block(w, config, i, x, x0, values, value_embedding)

    first_half = config.num_layers // 2
    skips = []
    for i in range(first_half):
        x = block(i, x, value_embedding(w, config, i, tokens))
        skips.append(x)
    for j, i in enumerate(config.recycle_layers):
        x = w[f"recycle_mods.{j}.scale"] * x + w[f"recycle_mods.{j}.bias"]
        x = block(i, x, None)
    for i in range(first_half, config.num_layers):
        if skips:
            x = x + w["skip_weights"][i - first_half] * skips.pop()
        x = block(i, x, value_embedding(w, config, i, tokens))

    raw = rms_norm(x, config) @ w["tok_emb.weight"].T
    return config.logit_soft_cap * np.tanh(raw / config.logit_soft_cap)


# ---------------------------------------------------------------------------------------------- embeddings


def embed(w: State, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    x = w["tok_emb.weight"][tokens]
    if config.bigram_buckets and config.bigram_hash == "xor":
        x = x + bigram(w, "bigram", hash_xor(tokens, config.bigram_buckets))
    elif config.bigram_buckets:
        x = x + bigram(w, "bigram_hash", hash_sum(tokens, config.bigram_buckets))
    if config.smear == "after_norm":
        return smear(rms_norm(x, config), sigmoid(w["smear.gate"]), config, tokens)
    if config.smear == "before_norm":  # here the gate is the share of the current position
        return rms_norm(smear(x, 1 - sigmoid(w["smear_gate"]), config, tokens), config)
    return rms_norm(x, config)


def smear(x: np.ndarray, previous_share: np.ndarray, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for t in range(x.shape[1]):
        before = x[:, t - 1] if t else np.zeros_like(x[:, 0])
        if config.smear_mask_bos:
            before = np.where(tokens[:, t, None] == config.bos_id, 0.0, before)
        out[:, t] = (1 - previous_share) * x[:, t] + previous_share * before
    return out


def bigram(w: State, prefix: str, buckets: np.ndarray) -> np.ndarray:
    return w.get(f"{prefix}.scale", 1.0) * (w[f"{prefix}.embed.weight"][buckets] @ w[f"{prefix}.proj.weight"].T)


def hash_xor(tokens: np.ndarray, buckets: int) -> np.ndarray:
    """Bucket of each position; the last one is kept for the first position of a sequence."""
    out = np.full(tokens.shape, buckets - 1)
    for b, row in enumerate(tokens.tolist()):
        for t in range(1, len(row)):
            out[b, t] = ((36313 * row[t]) ^ (27191 * row[t - 1])) % (buckets - 1)
    return out


def hash_sum(tokens: np.ndarray, buckets: int) -> np.ndarray:
    """Bucket of each position; token 0 stands before a sequence."""
    return np.array(
        [[(2654435761 * a + 40503 * b) % buckets for a, b in zip(r, [0, *r], strict=False)] for r in tokens.tolist()]
    )


def value_embedding(w: State, config: ModelConfig, layer: int, tokens: np.ndarray) -> np.ndarray | None:
    """What `layer` adds to its values [B, T, K·h], None for a layer that adds nothing."""
    if layer not in config.value_embed_layers:
        return None
    scale = w["ve_shared.scale"] * w[f"ve_layer_scales.{config.value_embed_layers.index(layer)}"]
    return scale * (w["ve_shared.embed.weight"][tokens] @ w["ve_shared.proj.weight"].T)


# ---------------------------------------------------------------------------------------------- blocks


def apply_block(
    w: State,
    config: ModelConfig,
    i: int,
    x: np.ndarray,
    x0: np.ndarray,
    values: list[np.ndarray],
    value_embedding: np.ndarray | None,
) -> np.ndarray:
    """Block i. `values` is empty before layer 0, which puts its values there for the others."""
    scale = 1 / np.sqrt(i + 1) if config.ln_scale else 1.0
    keep, mix = w[f"blocks.{i}.resid_mix"]
    u = keep * x + mix * x0
    u = u + w[f"blocks.{i}.attn_scale"] * attention(w, config, i, scale * rms_norm(u, config), values, value_embedding)
    up, down = mlp_matrices(w, i)
    return u + w[f"blocks.{i}.mlp_scale"] * (activation(scale * rms_norm(u, config) @ up.T, config) @ down.T)


def attention(
    w: State,
    config: ModelConfig,
    i: int,
    u: np.ndarray,
    values: list[np.ndarray],
    value_embedding: np.ndarray | None,
) -> np.ndarray:
    B, T, _ = u.shape
    H, K, h = config.num_heads, config.num_kv_heads, config.d_model // config.num_heads
    query, key, value, out = attention_matrices(w, config, i)
    q = (u @ query.T).reshape(B, T, H, h)
    k = (u @ key.T).reshape(B, T, K, h)
    v = u @ value.T
    if value_embedding is not None:
        v = v + value_embedding
    v = v.reshape(B, T, K, h)
    if config.value_residual and values:
        first_share, own_share = w[f"blocks.{i}.attn.vr_lambda"]
        v = first_share * values[0] + own_share * v
    if not values:
        values.append(v)

    q = rotate(rms_norm(q, config), config) * w[f"blocks.{i}.attn.q_gain"][:, None]
    k = rotate(rms_norm(k, config), config)
    y = np.empty((B, T, H, h))
    for head in range(H):
        group = head // (H // K)
        y[:, :, head] = causal_mean(q[:, :, head], k[:, :, group], v[:, :, group])
        if i >= config.num_layers - config.xsa_layers:
            y[:, :, head] = without_direction(y[:, :, head], v[:, :, group])
        if config.attention_gate:
            weight, bias = w[f"blocks.{i}.attn.attn_gate.weight"][head], w[f"blocks.{i}.attn.attn_gate.bias"][head]
            y[:, :, head] *= sigmoid(u @ weight + bias)[..., None]
    return y.reshape(B, T, H * h) @ out.T


def causal_mean(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head's values [B, T, h], each position's averaged over it and those before with the weights softmax(q k / √h)."""
    out = np.empty_like(v)
    for t in range(q.shape[1]):
        scores = np.einsum("bh,bsh->bs", q[:, t], k[:, : t + 1]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, t] = np.einsum("bs,bsh->bh", weights / weights.sum(axis=1, keepdims=True), v[:, : t + 1])
    return out


def without_direction(y: np.ndarray, v: np.ndarray) -> np.ndarray:
    """XSA: y less its component along v."""
    unit = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    return y - (y * unit).sum(axis=-1, keepdims=True) * unit


def rotate(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """x [B, T, heads, h] with the pairs (j, j + r/2) of its first r dimensions turned back by their position's angle."""
    T, h = x.shape[1], x.shape[-1]
    r = config.rope_dims or h
    base = config.rope_base
    if config.rope_ntk_len and config.rope_ntk_len < T:
        base *= (T / config.rope_ntk_len) ** (r / (r - 2))
    pairs = x[..., : r // 2] + 1j * x[..., r // 2 : r]
    angles = np.arange(T)[:, None] / base ** (2 * np.arange(r // 2) / r)
    turned = pairs * np.exp(-1j * angles)[None, :, None, :]
    return np.concatenate([turned.real, turned.imag, x[..., r:]], axis=-1)


def attention_matrices(w: State, config: ModelConfig, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query, key, value and output matrices of block i, each [out, in]."""
    if "qo_bank" in w:
        L = config.num_layers
        return w["qo_bank"][i], w["kv_bank"][i], w["kv_bank"][L + i], w["qo_bank"][L + i]
    attn = f"blocks.{i}.attn"
    return w[f"{attn}.c_q.weight"], w[f"{attn}.c_k.weight"], w[f"{attn}.c_v.weight"], w[f"{attn}.proj.weight"]


def mlp_matrices(w: State, i: int) -> tuple[np.ndarray, np.ndarray]:
    if "mlp_up_bank" in w:
        return w["mlp_up_bank"][i], w["mlp_down_bank"][i]
    return w[f"blocks.{i}.mlp.fc.weight"], w[f"blocks.{i}.mlp.proj.weight"]


def activation(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    slope = {"relu2": 0.0, "leaky_relu2": 0.5}[config.mlp_activation]
    return np.where(x > 0, x, slope * x) ** 2


def rms_norm(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------------------------------------- invented checkpoints


def random_state(config: ModelConfig, dialect: Dialect, seed: int) -> State:
    """A float32 checkpoint of `config` with every tensor away from where its technique would do nothing."""
    rng = np.random.default_rng(seed)
    V, L, D, F = config.vocab_size, config.num_layers, config.d_model, config.mlp_dim
    H, K = config.num_heads, config.num_kv_heads
    KV = K * (D // H)
    state: State = {}

    def near(center: float, name: str, *shape: int) -> None:
        state[name] = np.asarray(center + 0.3 * rng.standard_normal(shape), np.float32)

    def matrix(name: str, *shape: int) -> None:
        """[..., out, in], such that a normalized input gives a normalized output."""
        state[name] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    matrix("tok_emb.weight", V, D)
    if L > 1:
        near(1, "skip_weights", L // 2, D)
    if config.smear != "none":
        near(0, "smear.gate" if config.smear == "after_norm" else "smear_gate", D)
    if config.bigram_buckets:
        prefix = "bigram" if config.bigram_hash == "xor" else "bigram_hash"
        matrix(f"{prefix}.embed.weight", config.bigram_buckets, config.bigram_dim)
        matrix(f"{prefix}.proj.weight", D, config.bigram_dim)
        if config.bigram_scale_init:
            near(1, f"{prefix}.scale")
    if config.value_embed_layers:
        near(0, "ve_shared.embed.weight", V, config.value_embed_dim)
        matrix("ve_shared.proj.weight", KV, config.value_embed_dim)
        near(1, "ve_shared.scale")
    for j in range(len(config.value_embed_layers)):
        near(1, f"ve_layer_scales.{j}", 1)
    for j in range(len(config.recycle_layers)):
        near(1, f"recycle_mods.{j}.scale", D)
        near(0, f"recycle_mods.{j}.bias", D)
    for i in range(L):
        near(1, f"blocks.{i}.attn_scale", D)
        near(1, f"blocks.{i}.mlp_scale", D)
        near(0.5, f"blocks.{i}.resid_mix", 2, D)
        near(1.5, f"blocks.{i}.attn.q_gain", H)
        if config.attention_gate:
            near(0, f"blocks.{i}.attn.attn_gate.weight", H, D)
            near(0, f"blocks.{i}.attn.attn_gate.bias", H)
        if config.value_residual:
            near(0.5, f"blocks.{i}.attn.vr_lambda", 2)
        if dialect == "plain":
            matrix(f"blocks.{i}.attn.c_q.weight", D, D)
            matrix(f"blocks.{i}.attn.c_k.weight", KV, D)
            matrix(f"blocks.{i}.attn.c_v.weight", KV, D)
            matrix(f"blocks.{i}.attn.proj.weight", D, D)
            matrix(f"blocks.{i}.mlp.fc.weight", F, D)
            matrix(f"blocks.{i}.mlp.proj.weight", D, F)
    if dialect == "banked":
        matrix("qo_bank", 2 * L, D, D)
        matrix("kv_bank", 2 * L, KV, D)
        matrix("mlp_up_bank", L, F, D)
        matrix("mlp_down_bank", L, D, F)
    return state
