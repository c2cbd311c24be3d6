"""From a config to what a command works with, stage by stage: tasks, calls of experts, the policy with its rollouts.

Each stage is a function that takes the config and the stages before it. Commands take the stages that they need.
"""
