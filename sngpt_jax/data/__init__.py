"""Text into shards of tokens, and shards into batches: all but `loader` without jax."""
