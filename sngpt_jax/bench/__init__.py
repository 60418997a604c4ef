"""How fast a recipe's training step is on this machine, alone or beside the same model in PyTorch."""
