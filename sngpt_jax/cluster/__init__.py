"""Devices and processes: which there are, and how arrays lie over them."""
