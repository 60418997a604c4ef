"""A small golf-style model on text that every machine has: the Python standard library's source
code.

    ./launch.sh train --config configs/quickstart.py

Learns a tokenizer, prepares the text, trains, validates and prints a sample, in under 5 minutes on
2 CPU cores. The tokenizer keeps every byte of whitespace, which is syntax here.
"""

from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=1024,
        num_layers=4,
        d_model=128,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=384,
        max_seq_len=256,
    ),
    optim=OptimConfig(
        muon_lr=0.02,
        embed_lr=0.03,
        scalar_lr=0.02,
        muon_momentum_warmup_steps=100,
        newton_schulz_dtype="float32",
        warmdown_fraction=0.6,
    ),
    data=DataConfig(
        dir="data/quickstart",
        source="stdlib",
        val_docs=40,
        normalization="identity",
        batch_tokens=2048,
        seq_len=256,
        shuffle=True,
    ),
    train=TrainConfig(steps=400, checkpoint_every=100),
    eval=EvalConfig(
        every=100, tokens=65_536, device_batch_tokens=4096, sample_prompt="def ", sample_tokens=120
    ),
)
