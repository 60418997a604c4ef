"""Queries and keys as attention takes them: normalized, rotated by their positions, with a gain.

`api.prepare` is the operation. `specs.CASES` are its real shapes.
"""
