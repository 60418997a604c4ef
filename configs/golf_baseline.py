"""The parameter-golf challenge's own baseline: 9 layers, d = 512, 1024-token vocabulary,
17,059,912 parameters.

Published  1.2244 bits per byte on FineWeb (quantized artifact); 43.54 ms a step, 13,780 steps in 600 s on 8×H100.
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_baseline.py
1×H100     ./launch.sh train --config configs/golf_baseline.py --train.max-seconds 4800
Here       float32 master weights and optimizer state, the embedding's included; logits never rounded to bfloat16; one priming
           step instead of 20, off the clock as there. Speed and score: not measured on a GPU.
"""

from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=1024,
        num_layers=9,
        d_model=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_dim=1024,
        max_seq_len=1024,
    ),
    optim=OptimConfig(
        muon_lr=0.04,
        embed_lr=0.05,
        scalar_lr=0.04,
        muon_momentum_start=0.85,
        muon_momentum=0.95,
        muon_momentum_warmup_steps=500,
        schedule="linear_warmdown",
        warmdown_steps=1200,
        warmdown_clock="wall_clock",
    ),
    data=DataConfig(dir="data/fineweb_sp1024", source="golf", batch_tokens=524_288, seq_len=1024),
    train=TrainConfig(steps=20_000, max_seconds=600.0),
    eval=EvalConfig(every=1000),
)
