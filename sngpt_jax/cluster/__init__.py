"""Devices and processes, and how arrays lie over them."""
