"""Parameter-golf submission 1573: 12 layers, two of them applied twice, int5 weights; 29,406,940
parameters.

Published  1.1464 bits per byte on FineWeb, quantized, sliding windows (1.1333 before quantization, standard windows; one
           seed); 110.14 ms a step, 5,449 steps in 600 s on 8×H100; 15,925,822 bytes.
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_12l_recycled.py
1×H100     ./launch.sh train --config configs/golf_12l_recycled.py --train.max-seconds 4800
Here       Where the submission's texts disagree, docs/seeds.md says what is followed. float32 master weights, tables and
           Adam state included; Muon's momentum float32, there bfloat16 (--optim.muon-momentum-dtype); the gradient is
           clipped after the mean over the devices, there before it (--optim.grad-clip-scope), so that their number changes
           nothing. Late quantization-aware training missed the int5 weights there and is off here: --optim.qat-below 0.15
           has it do what it was meant to. SWA and EMA are both kept; SWA is what the submission scored.
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
        num_layers=12,
        d_model=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_dim=3 * 512,
        mlp_activation="leaky_relu2",
        max_seq_len=2048,
        rope_dims=16,
        rope_ntk_len=1024,
        xsa_layers=4,
        attention_gate=True,
        value_residual=True,
        value_embed_layers=(10, 11),
        value_embed_dim=128,
        recycle_layers=(3, 4),
        ln_scale=True,
        smear="after_norm",
        bigram_buckets=2048,
        bigram_dim=128,
        matrix_init="orthogonal",
    ),
    optim=OptimConfig(
        muon_lr=0.025,
        embed_lr=0.035,
        table_lr=0.035,
        scalar_lr=0.025,
        projection_rule="adam",
        muon_weight_decay=0.04,
        adam_weight_decay=0.04,
        muon_momentum_start=0.92,
        muon_momentum=0.99,
        muon_momentum_warmup_steps=1500,
        grad_clip=0.3,
        warmdown_steps=3500,
        warmdown_clock="wall_clock",
        ema_decay=0.997,
        swa_every=50,
        swa_below=0.2,
    ),
    data=DataConfig(dir="data/fineweb_sp1024", source="golf", batch_tokens=786_432, seq_len=2048),
    train=TrainConfig(steps=20_000, max_seconds=600.0, device_batch_tokens=98_304),
    eval=EvalConfig(every=1000, weights="swa"),
    export=ExportConfig(
        mlp_bits=5,
        attention_bits=5,
        control_dtype="float16",
        clip="search",
        table_clip="percentile",
        clip_floor=1.0,
        packed=True,
        codec="lzma",
        codec_level=9,
    ),
)
