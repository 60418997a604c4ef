"""The configurations that related recipes share. A recipe adds its own values, by section."""

from typing import Any, Literal

from sngpt_jax.config import Config, Level, changed

Fields = dict[str, Any]  # values by field name

# GPT-2 with RMSNorm gains and no biases
GPT2_LIKE: Fields = {
    "family": "pre_norm",
    "mlp_activation": "gelu",
    "positions": "learned",
    "qk_norm": False,
    "matrix_init": "normal",
    "embed_init_std": 0.02,
    "logit_soft_cap": 0.0,
    "norm_eps": 1e-5,
}


def cayley(
    size: Literal["small", "large"], levels: tuple[Level, ...], **sections: Fields
) -> Config:
    """The published sparse models: 202.5 M (small) or 1.3 B parameters."""
    small = size == "small"
    width, layers, heads = (1024, 12, 8) if small else (2048, 24, 16)
    model = GPT2_LIKE | {
        "vocab_size": 50_304 if small else 50_257,
        "num_layers": layers,
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "mlp_dim": 4 * width,
        "levels": levels,
        "logit_chunk": 4096,
    }
    optim = {"muon_momentum_warmup_steps": 0, "grad_clip": 1.0, "warmup_steps": 200}
    if small:
        rate = 1.2e-2
        optim |= {"muon_lr": rate, "embed_lr": rate, "scalar_lr": rate}
        optim |= {"warmdown_fraction": 0.9, "final_lr_fraction": 1.5e-4 / rate}
    else:
        optim |= {"muon_lr": 8e-3, "embed_lr": 3e-4, "scalar_lr": 3e-4, "warmdown_fraction": 0.5}
        optim |= {"final_lr_fraction": 1e-4 / 8e-3, "adam_final_lr_fraction": 1e-5 / 3e-4}
    data = {
        "dir": "data/fineweb_edu_gpt2",
        "source": "hub:HuggingFaceFW/fineweb-edu:sample-100BT@train",
        "tokenizer": "tokenizer.json",
        "val_docs": 10_000,
        "max_tokens": 25_000_000_000,
        "batch_tokens": 1_572_864,
        "slices": 96,
        "shuffle": True,
    }
    batch = {"device_batch_tokens": 32_768 if small else 8192}
    train = batch | {"steps": 12_716, "checkpoint_every": 500, "fsdp": 1 if small else 8}
    scoring = batch | {"every": 500, "tokens": 10_485_760}
    base = changed(Config(), model=model, optim=optim, data=data, train=train, eval=scoring)
    return changed(base, **sections)


def golf(**sections: Fields) -> Config:
    """The parameter-golf submissions: 10 minutes on 8×H100, 1024 tokens, width 512."""
    base = changed(
        Config(),
        model={"max_seq_len": 2048, "smear": "after_norm", "matrix_init": "orthogonal"},
        optim={
            "muon_momentum_start": 0.92,
            "muon_momentum": 0.99,
            "muon_momentum_warmup_steps": 1500,
            "grad_clip": 0.3,
            "warmdown_clock": "wall_clock",
        },
        data={
            "source": "golf",
            "val_docs": 50_000,
            "normalization": "nmt_nfkc",
            "batch_tokens": 786_432,
            "seq_len": 2048,
        },
        eval={"byte_count": "golf"},
        train={"max_seconds": 600.0, "device_batch_tokens": 98_304},
    )
    return changed(base, **sections)


def quickstart(**sections: Fields) -> Config:
    """Small models on the standard library's source code: minutes on two CPU cores."""
    base = changed(
        Config(),
        model={"num_layers": 4, "d_model": 128, "num_heads": 2, "max_seq_len": 256},
        optim={"newton_schulz_dtype": "float32", "warmdown_fraction": 0.6},
        data={
            "dir": "data/quickstart",
            "source": "stdlib",
            "val_docs": 40,
            "normalization": "identity",
            "batch_tokens": 2048,
            "seq_len": 256,
            "shuffle": True,
        },
        train={"checkpoint_every": 100},
        eval={"every": 100, "tokens": 65_536, "device_batch_tokens": 4096},
    )
    return changed(base, **sections)
