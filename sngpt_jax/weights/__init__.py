"""Trained models, read from runs, artifacts and other programs' checkpoints, and exported."""
