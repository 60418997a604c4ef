"""The residual stream's weighted sums, each with the RMSNorm that follows it, in one pass.

`api.sum_norm` is the operation. `specs.CASES` are its real shapes.
"""
