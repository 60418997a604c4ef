"""A trained model read back from a run or an artifact."""
