"""Parameter-golf submission 1573: 12 layers, two of them applied twice, int5 weights.

It has 29,406,940 parameters.

Published  1.1464 bits per byte on FineWeb: quantized, sliding windows, one seed
           1.1333 before quantization with standard windows; 15,925,822 bytes
           110.14 ms per step, 5,449 steps in 600 s on 8×H100
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_12l_recycled.py
1×H100     ./launch.sh train --config configs/golf_12l_recycled.py --train.max-seconds 4800
Here       docs/seeds.md says which text is followed where the submission's texts disagree.
           Master weights, tables, Adam state and Muon's momentum are float32; the submission's
           momentum was bfloat16 (--optim.muon-momentum-dtype). The mean gradient is clipped, so
           that the number of devices changes nothing; the submission clipped each device's
           gradient (--optim.grad-clip-scope). Late quantization-aware training missed the int5
           weights there and is off here; --optim.qat-below 0.15 does what it was meant to do.
           SWA and EMA are both kept. The submission scored SWA.
"""

from sngpt_jax.config.families import golf

config = golf(
    model={
        "num_layers": 12,
        "mlp_dim": 3 * 512,
        "mlp_activation": "leaky_relu2",
        "rope_dims": 16,
        "rope_ntk_len": 1024,
        "xsa_layers": 4,
        "attention_gate": True,
        "value_residual": True,
        "value_embed_layers": (10, 11),
        "recycle_layers": (3, 4),
        "ln_scale": True,
        "bigram_buckets": 2048,
    },
    optim={
        "muon_lr": 0.025,
        "embed_lr": 0.035,
        "table_lr": 0.035,
        "scalar_lr": 0.025,
        "projection_rule": "adam",
        "muon_weight_decay": 0.04,
        "adam_weight_decay": 0.04,
        "warmdown_steps": 3500,
        "ema_decay": 0.997,
        "swa_every": 50,
        "swa_below": 0.2,
    },
    eval={"weights": "swa"},
    export={
        "mlp_bits": 5,
        "attention_bits": 5,
        "control_dtype": "float16",
        "clip": "search",
        "table_clip": "percentile",
        "clip_floor": 1.0,
    },
)
