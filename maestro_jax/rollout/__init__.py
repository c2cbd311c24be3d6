"""Rollouts: episodes of a policy that calls experts, decoded in lanes on the device."""
