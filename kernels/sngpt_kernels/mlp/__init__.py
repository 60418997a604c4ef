"""An attention's output product and the MLP half of a block, in products with epilogues.

`api.residual_mlp` is the operation. `specs.CASES` are its real shapes.
"""
