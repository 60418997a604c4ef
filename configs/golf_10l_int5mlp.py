"""Parameter-golf submission 465: 10 layers, int5 MLPs and int6 attention; 24,730,705 parameters.

Published  1.15083 bits per byte on FineWeb, quantized, sliding windows, mean of 3 seeds (1.1606 at the last step, standard
           windows); 100.02 ms a step, 5,999 steps in 600 s on 8×H100; 15,680,288 bytes.
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_10l_int5mlp.py
1×H100     ./launch.sh train --config configs/golf_10l_int5mlp.py --train.max-seconds 4800
Here       The described cosine schedule was never run: the warmdown is linear, by the clock. float32 master weights, tables,
           Adam state and averages included; there the tables were bfloat16 (--optim.average-table-dtype for the averages).
           Speed and score: not measured on a GPU.
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
        num_layers=10,
        d_model=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_dim=3 * 512,
        max_seq_len=2048,
        smear="after_norm",
        bigram_buckets=4096,
        bigram_dim=128,
        bigram_proj_gain=(2 * 10) ** -0.5,
        matrix_init="orthogonal",
    ),
    optim=OptimConfig(
        muon_lr=0.02,
        embed_lr=0.03,
        table_lr=0.03,
        scalar_lr=0.02,
        projection_rule="muon",
        muon_weight_decay=0.04,
        adam_weight_decay=0.01,
        muon_momentum_start=0.92,
        muon_momentum=0.99,
        muon_momentum_warmup_steps=1500,
        grad_clip=0.3,
        warmdown_steps=3000,
        warmdown_clock="wall_clock",
        swa_every=50,
        swa_below=0.5,
    ),
    data=DataConfig(dir="data/fineweb_sp1024", source="golf", batch_tokens=786_432, seq_len=2048),
    train=TrainConfig(steps=20_000, max_seconds=600.0, device_batch_tokens=98_304),
    eval=EvalConfig(every=1000, weights="swa"),
    export=ExportConfig(
        mlp_bits=5,
        attention_bits=6,
        embed_bits=16,
        table_bits=8,
        late_key_layers=1,
        control_dtype="float16",
        codes="full",
        codec="zstd",
    ),
)
