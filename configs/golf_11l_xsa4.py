"""Parameter-golf submission 333: 11 layers, XSA in the last 4; 25,388,121 parameters.

Initial values are overtone (embedding) and phase (residual mixing).

Published  1.1565 bits per byte on FineWeb: quantized, sliding windows, mean of 3 seeds
           1.1664 at the last step with standard windows, seed 1337; 15,990,398 bytes
           75.86 ms per step, 7,910 steps in 600 s on 8×H100
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_11l_xsa4.py
1×H100     ./launch.sh train --config configs/golf_11l_xsa4.py --train.max-seconds 4800
Here       XSA is as described. The submission's code subtracted v / 2048 instead, which does
           nearly nothing (--model.xsa-layers 0). Master weights, tables and Adam state are
           float32. Late quantization-aware training is off, as in the logged run;
           --optim.qat-below 0.66 begins it at 75 % of the time.
"""

from sngpt_jax.config.families import golf

config = golf(
    model={
        "num_layers": 11,
        "mlp_dim": int(2.75 * 512),
        "rope_base": 50_000.0,
        "xsa_layers": 4,
        "bigram_buckets": 2048,
        "bigram_proj_gain": (2 * 11) ** -0.5,
        "embed_init": "overtone",
        "resid_mix_init": "phase",
    },
    optim={
        "muon_lr": 0.025,
        "embed_lr": 0.035,
        "table_lr": 0.035,
        "scalar_lr": 0.025,
        "muon_weight_decay": 0.04,
        "adam_weight_decay": 0.04,
        "warmdown_steps": 3000,
        "swa_every": 50,
        "swa_below": 0.4,
    },
    data={"batch_tokens": 524_288},
    train={"device_batch_tokens": 65_536},
    eval={"weights": "swa"},
    export={
        "mlp_bits": 5,
        "attention_bits": 6,
        "embed_bits": 16,
        "table_bits": 6,
        "late_key_layers": 2,
        "passthrough_size": 65_536,
        "codes": "full",
        "prune_fraction": 0.02,
    },
)
