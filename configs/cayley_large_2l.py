r"""cayley-large-2L: a 1.3 B GPT with two levels of code, 48 of 32,768 features per token.

It has 24 layers of width 2048.

Published  validation loss 2.8081 after 20 B tokens; about 248k tok/s on 8×RTX PRO 6000
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train \
               --tokenizer tokenizer.json --val-docs 10000 --max-tokens 25000000000 \
               --out data/fineweb_edu_gpt2
8×H100     ./launch.sh train --config configs/cayley_large_2l.py
1×H100     add --train.fsdp 1
Here       Batch and steps are those of the small recipe.
"""

from sngpt_jax.config import Level
from sngpt_jax.config.families import cayley

config = cayley("large", levels=(Level(11, 16, 0), Level(15, 32, 256)))
