"""Measurements: training steps, kernels, exports, scoring. Part of a checkout, not of the wheel."""
