"""The optimizers as optax transformations, what each parameter takes, and the schedules and
averages beside them.
"""
