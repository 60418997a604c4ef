"""The network in flax.nnx: `gpt` and `pre_norm` assemble the parts of the other files."""
