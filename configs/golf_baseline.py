from sngpt_jax.config import Config, OptimConfig

config = Config(optim=OptimConfig(warmdown_steps=1200))
