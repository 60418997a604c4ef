"""Optimizers as optax transformations, the rule of each parameter, schedules and averages."""
