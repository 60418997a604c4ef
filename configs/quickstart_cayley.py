r"""A small GPT with a three-level sparse code before every MLP, on the text of quickstart.

    ./launch.sh train --config configs/quickstart_cayley.py
    ./launch.sh train --config configs/quickstart_cayley.py --model.levels "" \
        --run-dir runs/quickstart_dense

The second command trains its dense twin. 28 of 4,096 features are active per token. Data and
tokenizer are those of quickstart. A training takes under 5 minutes on 2 CPU cores.
"""

from sngpt_jax.config import Level
from sngpt_jax.config.families import GPT2_LIKE, quickstart

config = quickstart(
    model=GPT2_LIKE
    | {
        "num_kv_heads": 2,
        "mlp_dim": 512,
        "levels": (Level(7, 4, 0), Level(10, 8, 32), Level(12, 16, 32)),
    },
    optim={
        "muon_lr": 1e-2,
        "embed_lr": 1e-2,
        "scalar_lr": 1e-2,
        "muon_momentum_warmup_steps": 0,
        "grad_clip": 1.0,
        "warmup_steps": 20,
        "final_lr_fraction": 0.02,
    },
    train={"steps": 300, "device_batch_tokens": 1024},
    eval={"health_tokens": 8192},
)
