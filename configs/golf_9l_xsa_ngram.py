"""Parameter-golf submission 740: 9 layers, XSA in all of them, int8 weights; 17,650,248 parameters.

Published  1.1700 bits per byte on FineWeb, quantized, sliding windows, mean of 3 seeds; about 87 ms a step, 6,900 steps in
           600 s on 8×H100; about 14.68 MB. Its 1.0909 and 1.0238 with an n-gram cache are no probabilities (docs/seeds.md).
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_9l_xsa_ngram.py
1×H100     ./launch.sh train --config configs/golf_9l_xsa_ngram.py --train.max-seconds 4800
Here       Rotary positions turn the described 25 % of a head; the submission's code turned 50 % (--model.rope-dims 32). float32
           master weights, tables and Adam state included. Speed and score: not measured on a GPU.
"""

from sngpt_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(
        vocab_size=1024,
        num_layers=9,
        d_model=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_dim=2 * 512,
        mlp_activation="leaky_relu2",
        max_seq_len=2048,
        rope_dims=16,
        xsa_layers=9,
        ln_scale=True,
        smear="before_norm",
        bigram_buckets=4096,
        bigram_dim=128,
        bigram_hash="sum",
        bigram_init_std=1.0,
        bigram_scale_init=0.0,
        matrix_init="orthogonal",
    ),
    optim=OptimConfig(
        muon_lr=0.02,
        embed_lr=0.03,
        table_lr=0.02,
        scalar_lr=0.02,
        projection_rule="adam",
        muon_weight_decay=0.04,
        muon_momentum_start=0.92,
        muon_momentum=0.99,
        muon_momentum_warmup_steps=1500,
        grad_clip=0.3,
        warmdown_steps=3500,
        warmdown_clock="wall_clock",
    ),
    data=DataConfig(dir="data/fineweb_sp1024", source="golf", batch_tokens=786_432, seq_len=2048),
    train=TrainConfig(steps=20_000, max_seconds=600.0, device_batch_tokens=98_304),
    eval=EvalConfig(every=1000),
    export=ExportConfig(
        codes="full", clip="percentile", table_clip="percentile", clip_floor=1.0, codec="zstd"
    ),
)
