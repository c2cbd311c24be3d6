"""From an episode's answer to its reward: graders per task source, and the sum of reward terms. Never imports jax."""
