"""One optimizer step, the loop around it, and its cost."""
