"""The registry: frozen experts, the skills that use them, and the machinery that runs a call. Never imports jax."""
