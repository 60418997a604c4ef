"""Causal attention with grouped key/value heads that can exclude each position's own value (XSA).

Start at `attention` (`api`); the definition in numpy is `reference`.
"""

from sngpt_kernels.xsa.api import attention
from sngpt_kernels.xsa.xla import exclude_own_value, masked_attention

__all__ = ["attention", "exclude_own_value", "masked_attention"]
