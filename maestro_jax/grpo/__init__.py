"""Learning: group advantages, policy losses, chunked log-probabilities and the sharded update."""
