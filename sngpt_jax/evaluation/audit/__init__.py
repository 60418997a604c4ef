"""Checks of a score: of somebody else's numbers, of a run, and of an artifact."""
