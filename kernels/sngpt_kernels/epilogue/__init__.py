"""What follows attention, per head: the exclusion of a position's own value (XSA), and a gate.

`api.finish` is the operation. `specs.CASES` are its real shapes.
"""
