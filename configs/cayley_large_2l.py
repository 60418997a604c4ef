r"""cayley-large-2L: a 1.3 B GPT, 24 layers of width 2048, with two levels of code, 48 of 32,768
features a token.

Published  validation loss 2.8081 after 20 B tokens; about 248k tok/s on 8 × RTX PRO 6000.
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train --tokenizer tokenizer.json \
               --val-docs 10000 --max-tokens 25000000000 --out data/fineweb_edu_gpt2
8×H100     ./launch.sh train --config configs/cayley_large_2l.py
1×H100     add --train.fsdp 1
Here       batch and steps are those of the small recipe. Speed, memory and score: not measured on a GPU.
"""

from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        family="pre_norm",
        vocab_size=50_257,
        num_layers=24,
        d_model=2048,
        num_heads=16,
        num_kv_heads=16,
        mlp_dim=8192,
        mlp_activation="gelu",
        levels="11,16,0;15,32,256",
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
        muon_lr=8e-3,
        embed_lr=3e-4,
        scalar_lr=3e-4,
        muon_momentum=0.95,
        muon_momentum_warmup_steps=0,
        grad_clip=1.0,
        warmup_steps=200,
        warmdown_fraction=0.5,
        final_lr_fraction=1e-4 / 8e-3,
        adam_final_lr_fraction=1e-5 / 3e-4,
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
    train=TrainConfig(steps=12_716, device_batch_tokens=8192, checkpoint_every=500, fsdp=8),
    eval=EvalConfig(every=500, tokens=10_485_760, device_batch_tokens=8192),
)
