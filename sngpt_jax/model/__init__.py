"""The network in flax.nnx: `gpt.py` puts the parts of the other files together."""
