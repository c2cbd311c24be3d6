"""Tasks in: images, sources (TFDS, verl parquet), the Grain pipeline and the offline suite. No jax in this room."""
