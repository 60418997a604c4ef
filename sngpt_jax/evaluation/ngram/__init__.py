"""N-gram caches: the scored tokens of a stream help to predict the next token."""
