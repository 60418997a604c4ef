"""The parameter-golf challenge's own baseline: 9 layers, width 512, 1024 tokens.

It has 17,059,912 parameters.

Published  1.2244 bits per byte on FineWeb (quantized artifact)
           43.54 ms per step, 13,780 steps in 600 s on 8×H100
Data       ./launch.sh prepare --source golf --vocab-size 1024 --out data/fineweb_sp1024
8×H100     ./launch.sh train --config configs/golf_baseline.py
1×H100     ./launch.sh train --config configs/golf_baseline.py --train.max-seconds 4800
Here       Master weights and optimizer state are float32, the embedding's included. Logits are
           never rounded to bfloat16. One priming step instead of 20 runs off the clock.
"""

from sngpt_jax.config import Config, DataConfig, OptimConfig, TrainConfig

# The defaults of the model, the optimizer and the data are the baseline's.
config = Config(
    optim=OptimConfig(warmdown_steps=1200, warmdown_clock="wall_clock"),
    data=DataConfig(source="golf", val_docs=50_000),
    train=TrainConfig(max_seconds=600.0),
)
