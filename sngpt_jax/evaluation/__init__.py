"""Scores of a model over a validation stream, downstream tasks, and health of sparse codes."""
