"""A whole training run: warm start, reinforcement from update to update, figures before and after."""
