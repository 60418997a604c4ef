"""Benchmarks of training steps, kernels, exports and scoring. They are not part of the wheel."""
