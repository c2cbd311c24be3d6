"""Warm start: supervised fine-tuning on the demonstrations of a weak router (offline runs only)."""
