"""Checkpoints of the original PyTorch scripts: invented ones, and what they compute in float64.

Names and [out, in] matrices are the scripts' own. In `banked` checkpoints the blocks' matrices are
stacked into four tensors; in `plain` ones each is a tensor of its own.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sngpt_jax.config import ModelConfig
from tests import oracles

Dialect = Literal["plain", "banked"]
State = dict[str, np.ndarray]

# what the submissions' models have in common at any size
_BIGRAM = {"bigram_buckets": 32, "bigram_dim": 12}
_SCRIPTS: dict[str, dict[str, Any]] = {
    "333": {**_BIGRAM, "xsa_layers": 2, "rope_base": 50_000.0, "smear": "after_norm"},
    "465": {**_BIGRAM, "smear": "after_norm"},
    "740": {
        **_BIGRAM,
        "mlp_activation": "leaky_relu2",
        "ln_scale": True,
        "smear": "before_norm",
        "bigram_hash": "sum",
        "bigram_init_std": 1.0,
        "bigram_scale_init": 0.0,
    },
    "1573": {
        **_BIGRAM,
        "mlp_activation": "leaky_relu2",
        "xsa_layers": 2,
        "rope_dims": 4,
        "rope_ntk_len": 10,
        "ln_scale": True,
        "smear": "after_norm",
        "smear_mask_bos": True,
        "attention_gate": True,
        "value_residual": True,
        "value_embed_dim": 12,
    },
}


def like(script: str, **fields: Any) -> ModelConfig:
    """A model with the techniques of submission `script`, and with `fields`."""
    return ModelConfig(**{**_SCRIPTS[script], **fields})


def logits(state: Mapping[str, np.ndarray], config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Soft-capped logits [B, T, V] of `tokens` [B, T], all in float64."""
    return oracles.gpt(config, params_of(state, config), tokens)


def params_of(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """The tensors nested under the model's own names, matrices [in, out]."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in state.items()}
    params: dict[str, Any] = {
        "embed": {"table": w["tok_emb.weight"]},
        "skip_weights": w.get("skip_weights"),
    }
    if config.smear == "after_norm":
        params["smear"] = {"gate": w["smear.gate"]}
    # here the gate is the share of the current position: sigmoid(-g) = 1 - sigmoid(g)
    if config.smear == "before_norm":
        params["smear"] = {"gate": -w["smear_gate"]}
    if config.bigram_buckets:
        prefix = "bigram" if config.bigram_hash == "xor" else "bigram_hash"
        params["bigram"] = {
            "table": w[f"{prefix}.embed.weight"],
            "proj": w[f"{prefix}.proj.weight"].T,
        }
        if config.bigram_scale_init:
            params["bigram"]["scale"] = w[f"{prefix}.scale"]
    if config.value_embed_layers:
        params["value_embed"] = {
            "table": w["ve_shared.embed.weight"],
            "proj": w["ve_shared.proj.weight"].T,
            "scale": w["ve_shared.scale"],
            "layer_scale": [
                w[f"ve_layer_scales.{j}"][0] for j in range(len(config.value_embed_layers))
            ],
        }
    applications = range(len(config.recycle_layers))
    params["recycle"] = {
        name: [w[f"recycle_mods.{j}.{name}"] for j in applications] for name in ("scale", "bias")
    }
    params["blocks"] = [block_of(w, config, i) for i in range(config.num_layers)]
    return params


def block_of(w: State, config: ModelConfig, i: int) -> dict[str, Any]:
    block, attn, L = f"blocks.{i}", f"blocks.{i}.attn", config.num_layers
    if "qo_bank" in w:
        (query, out), (key, value) = (w[bank][[i, L + i]] for bank in ("qo_bank", "kv_bank"))
        up, down = w["mlp_up_bank"][i], w["mlp_down_bank"][i]
    else:
        names = ("c_q", "c_k", "c_v", "proj")
        query, key, value, out = (w[f"{attn}.{name}.weight"] for name in names)
        up, down = w[f"{block}.mlp.fc.weight"], w[f"{block}.mlp.proj.weight"]
    gains = {"query": query.T, "key": key.T, "value": value.T, "out": out.T}
    gains["q_gain"] = w[f"{attn}.q_gain"]
    if config.attention_gate:
        gains["gate_weight"] = w[f"{attn}.attn_gate.weight"].T
        gains["gate_bias"] = w[f"{attn}.attn_gate.bias"]
    if config.value_residual:
        gains["value_mix"] = w[f"{attn}.vr_lambda"]
    scales = {name: w[f"{block}.{name}"] for name in ("attn_scale", "mlp_scale", "resid_mix")}
    return {"attn": gains, "mlp": {"up": up.T, "down": down.T}, **scales}


# ------------------------------------------------------------ invented checkpoints


def random_state(config: ModelConfig, dialect: Dialect, seed: int) -> State:
    """A float32 checkpoint of `config` with every tensor away from where its technique would do
    nothing.
    """
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
