r"""The 202.5 M GPT with one level of code, 16 of 1024 features a token: stands in for the
predecessor cayley-10b.

Published  the predecessor: validation loss 3.173 after 10 B tokens; its exact levels are not public.
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train --tokenizer tokenizer.json \
               --val-docs 10000 --max-tokens 25000000000 --out data/fineweb_edu_gpt2
2×H200     ./launch.sh train --config configs/cayley_small_1l.py
8×H100     the same command: a step's 1536 sequences are dealt out over all devices
Here       the schedule of its successors over half as many steps.
           The table has 50,304 rows for GPT-2's 50,257 tokens. Speed, memory and score: not measured on a GPU.
"""

from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        family="pre_norm",
        vocab_size=50_304,
        num_layers=12,
        d_model=1024,
        num_heads=8,
        num_kv_heads=8,
        mlp_dim=4096,
        mlp_activation="gelu",
        levels="10,16,0",
        max_seq_len=1024,
        positions="learned",
        qk_norm=False,
        matrix_init="normal",
        matrix_init_std=0.02,
        embed_init_std=0.02,
        logit_soft_cap=0.0,
        logit_chunk=4096,
        norm_eps=1e-5,
    ),
    optim=OptimConfig(
        muon_lr=1.2e-2,
        embed_lr=1.2e-2,
        scalar_lr=1.2e-2,
        muon_momentum=0.95,
        muon_momentum_warmup_steps=0,
        grad_clip=1.0,
        warmup_steps=200,
        warmdown_fraction=0.9,
        final_lr_fraction=1.5e-4 / 1.2e-2,
    ),
    data=DataConfig(
        dir="data/fineweb_edu_gpt2",
        source="hub:HuggingFaceFW/fineweb-edu:sample-100BT@train",
        tokenizer="tokenizer.json",
        val_docs=10_000,
        max_tokens=25_000_000_000,
        batch_tokens=1_572_864,
        seq_len=1024,
        slices=96,
        shuffle=True,
    ),
    train=TrainConfig(steps=6_358, device_batch_tokens=32_768, checkpoint_every=500),
    eval=EvalConfig(every=500, tokens=10_485_760, device_batch_tokens=32_768),
)
