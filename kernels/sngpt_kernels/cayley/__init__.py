"""CayleySAE: a sparse hierarchical code over a parameter-free dictionary of parities.

After https://arxiv.org/abs/2607.20652. The public operation is `api.encode_decode`, its definition
`reference`. `xla` has the parts that serve the code's statistics.
"""
