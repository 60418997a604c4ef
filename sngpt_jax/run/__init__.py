"""What a run writes, measures and shows."""
