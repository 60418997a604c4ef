"""Scores of a model over a validation stream, downstream tasks, and the health of its sparse codes."""
