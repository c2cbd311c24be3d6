"""Tasks in: sources (TFDS, verl parquet, JSONL), benchmarks, the Grain pipeline and the offline suite. No jax here."""
