"""A small golf-style model on text that every machine has: Python's standard library.

    ./launch.sh train --config configs/quickstart.py

It learns a tokenizer, prepares the text, trains, validates and prints a sample, in under 5 minutes
on 2 CPU cores. The tokenizer keeps every byte of whitespace, because whitespace is syntax here.
"""

from sngpt_jax.config.families import quickstart

config = quickstart(
    model={"num_kv_heads": 1, "mlp_dim": 384},
    optim={"muon_lr": 0.02, "embed_lr": 0.03, "scalar_lr": 0.02, "muon_momentum_warmup_steps": 100},
    train={"steps": 400},
    eval={"sample_prompt": "def ", "sample_tokens": 120},
)
