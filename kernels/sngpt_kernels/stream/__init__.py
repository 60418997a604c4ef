"""The residual stream's sum with channel weights, and its RMSNorm, in one pass."""
