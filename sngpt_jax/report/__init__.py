"""Runs side by side: what their directories hold, as one HTML page."""
