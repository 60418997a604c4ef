"""CayleySAE (arXiv:2607.20652): a sparse hierarchical code over a dictionary of parities.

The public operation is `api.encode_decode`. `xla` also serves the code's statistics.
"""
