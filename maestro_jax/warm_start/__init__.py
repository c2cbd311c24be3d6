"""Warm start: supervised fine-tuning on demonstrations, before reinforcement."""
