"""maestro_jax: train a vision-language policy to orchestrate frozen experts (JAX, TPU and GPU)."""

__version__ = "0.1.0"
