"""Evaluation: a policy on held-out tasks, and what routing without learning would reach."""
