"""Checkpoints: one composite commit of parameters, optimiser, data position and run facts (Orbax)."""
