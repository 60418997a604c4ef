r"""The 202.5 M GPT with one level of code, 16 of 1024 features per token.

It stands in for the predecessor cayley-10b.

Published  the predecessor: validation loss 3.173 after 10 B tokens; its exact levels are not
           public
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train \
               --tokenizer tokenizer.json --val-docs 10000 --max-tokens 25000000000 \
               --out data/fineweb_edu_gpt2
2×H200     ./launch.sh train --config configs/cayley_small_1l.py
8×H100     the same command: all devices share the 1536 sequences of a step
Here       The schedule is that of the successors, with half as many steps.
           The token table has 50,304 rows for GPT-2's 50,257 tokens.
"""

from sngpt_jax.config import Level
from sngpt_jax.config.families import cayley

config = cayley("small", levels=(Level(10, 16, 0),), train={"steps": 6_358})
