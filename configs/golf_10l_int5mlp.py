"""Parameter-golf submission 465: 10 layers, int5 MLPs, int6 attention; 24,730,705 parameters.

Published  1.15083 bits per byte on FineWeb: quantized, sliding windows, mean of 3 seeds
           1.1606 at the last step with standard windows; 15,680,288 bytes
           100.02 ms per step, 5,999 steps in 600 s on 8×H100
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_10l_int5mlp.py
1×H100     ./launch.sh train --config configs/golf_10l_int5mlp.py --train.max-seconds 4800
Here       The described cosine schedule was never run: the warmdown is linear, by the clock.
           Master weights, tables, Adam state and averages are float32. The submission kept its
           tables in bfloat16 (--optim.average-table-dtype sets that for the averages).
"""

from sngpt_jax.config.families import golf

config = golf(
    model={
        "num_layers": 10,
        "mlp_dim": 3 * 512,
        "bigram_buckets": 4096,
        "bigram_proj_gain": (2 * 10) ** -0.5,
    },
    optim={
        "muon_lr": 0.02,
        "embed_lr": 0.03,
        "table_lr": 0.03,
        "scalar_lr": 0.02,
        "muon_weight_decay": 0.04,
        "adam_weight_decay": 0.01,
        "warmdown_steps": 3000,
        "swa_every": 50,
    },
    eval={"weights": "swa"},
    export={
        "mlp_bits": 5,
        "attention_bits": 6,
        "embed_bits": 16,
        "late_key_layers": 1,
        "control_dtype": "float16",
        "codes": "full",
        "table_clip": "percentile",
        "table_clip_floor": 1.0,
        "table_codes": "symmetric",
    },
)
