"""N-gram caches: what has been scored of a stream helps to predict what comes next. `cache` says
which there are.
"""
