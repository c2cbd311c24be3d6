"""The policy: Qwen3-VL in Flax NNX, its tokens and its host-side image preparation."""
