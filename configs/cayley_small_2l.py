r"""cayley-small-2L: the 202.5 M GPT with two levels of code, 48 of 32,768 features per token.

It trains on 20 B tokens.

Published  validation loss 3.1584; about 545k tok/s on 8×A100
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train \
               --tokenizer tokenizer.json --val-docs 10000 --max-tokens 25000000000 \
               --out data/fineweb_edu_gpt2
2×H200     ./launch.sh train --config configs/cayley_small_2l.py
8×H100     the same command: all devices share the 1536 sequences of a step
Here       The token table has 50,304 rows for GPT-2's 50,257 tokens.
"""

from sngpt_jax.config import Level
from sngpt_jax.config.families import cayley

config = cayley("small", levels=(Level(10, 16, 0), Level(15, 32, 256)))
