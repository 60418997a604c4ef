"""A small GPT with a three-level sparse code before every MLP, on the text of quickstart: the
standard library's source.

    ./launch.sh train --config configs/quickstart_cayley.py
    ./launch.sh train --config configs/quickstart_cayley.py --model.levels "" --run-dir runs/quickstart_dense

The second command trains its dense twin.

28 of 4,096 features a token. Data and tokenizer are those of quickstart; under 5 minutes on 2 CPU
cores.
"""

from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        family="pre_norm",
        vocab_size=1024,
        num_layers=4,
        d_model=128,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=512,
        mlp_activation="gelu",
        levels="7,4,0;10,8,32;12,16,32",
        max_seq_len=256,
        positions="learned",
        qk_norm=False,
        matrix_init="normal",
        matrix_init_std=0.02,
        embed_init_std=0.02,
        logit_soft_cap=0.0,
        norm_eps=1e-5,
    ),
    optim=OptimConfig(
        muon_lr=1e-2,
        embed_lr=1e-2,
        scalar_lr=1e-2,
        muon_momentum=0.95,
        muon_momentum_warmup_steps=0,
        newton_schulz_dtype="float32",
        grad_clip=1.0,
        warmup_steps=20,
        warmdown_fraction=0.6,
        final_lr_fraction=0.02,
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
    train=TrainConfig(steps=300, device_batch_tokens=1024, checkpoint_every=100),
    eval=EvalConfig(every=100, tokens=65_536, device_batch_tokens=4096, health_tokens=8192),
)
