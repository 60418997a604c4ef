r"""vanilla-small: the 202.5 M GPT without a code, the dense twin of cayley_small_3l.

Published  validation loss 2.8530 after 20 B tokens
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train \
               --tokenizer tokenizer.json --val-docs 10000 --max-tokens 25000000000 \
               --out data/fineweb_edu_gpt2
2×H200     ./launch.sh train --config configs/cayley_small_dense.py
8×H100     the same command: all devices share the 1536 sequences of a step
Here       The token table has 50,304 rows for GPT-2's 50,257 tokens.
"""

from sngpt_jax.config.families import cayley

config = cayley("small", levels=())
