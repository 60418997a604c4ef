"""CayleySAE: a sparse hierarchical code over a parameter-free dictionary of parities (after
https://arxiv.org/abs/2607.20652).
"""

from sngpt_kernels.cayley.api import encode_decode
from sngpt_kernels.cayley.reference import STD_FLOOR
from sngpt_kernels.cayley.xla import all_scores, combine, scores_at, sum_squared_scores

__all__ = ["STD_FLOOR", "all_scores", "combine", "encode_decode", "scores_at", "sum_squared_scores"]
