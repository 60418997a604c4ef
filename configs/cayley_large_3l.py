r"""cayley-large-3L: the 1.3 B GPT with three levels of code, 112 of 131,072 features per token.

Published  no figures are public
Data       tokenizer.json: https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json
           ./launch.sh prepare --source hub:HuggingFaceFW/fineweb-edu:sample-100BT@train \
               --tokenizer tokenizer.json --val-docs 10000 --max-tokens 25000000000 \
               --out data/fineweb_edu_gpt2
8×H100     ./launch.sh train --config configs/cayley_large_3l.py
1×H100     add --train.fsdp 1
Here       Batch and steps are those of the small recipe.
"""

from sngpt_jax.config import Level
from sngpt_jax.config.families import cayley

config = cayley("large", levels=(Level(11, 16, 0), Level(15, 32, 256), Level(17, 64, 256)))
