"""Parameter-golf submission 740: 9 layers, XSA in all of them, int8; 17,650,248 parameters.

Published  1.1700 bits per byte on FineWeb: quantized, sliding windows, mean of 3 seeds
           about 14.68 MB; about 87 ms per step, 6,900 steps in 600 s on 8×H100
           Its 1.0909 and 1.0238 with an n-gram cache are not valid scores (docs/seeds.md).
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_9l_xsa_ngram.py
1×H100     ./launch.sh train --config configs/golf_9l_xsa_ngram.py --train.max-seconds 4800
Here       Rotary positions rotate the described 25 % of a head. The submission's code rotated
           50 % (--model.rope-dims 32). Master weights, tables and Adam state are float32.
"""

from sngpt_jax.config.families import golf

config = golf(
    model={
        "num_layers": 9,
        "mlp_dim": 2 * 512,
        "mlp_activation": "leaky_relu2",
        "rope_dims": 16,
        "xsa_layers": 9,
        "ln_scale": True,
        "smear": "before_norm",
        "bigram_buckets": 4096,
        "bigram_hash": "sum",
        "bigram_init_std": 1.0,
        "bigram_scale_init": 0.0,
    },
    optim={
        "muon_lr": 0.02,
        "embed_lr": 0.03,
        "table_lr": 0.02,
        "scalar_lr": 0.02,
        "projection_rule": "adam",
        "muon_weight_decay": 0.04,
        "warmdown_steps": 3500,
    },
    export={"codes": "full", "clip": "percentile", "table_clip": "percentile", "clip_floor": 1.0},
)
