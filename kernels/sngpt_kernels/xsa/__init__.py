"""Causal attention with grouped key/value heads that can exclude a position's own value (XSA).

The public operation is `api.attention`, its definition `reference`.
"""
