"""What a run shows: metrics as JSONL, live progress, figures and the closing table. Numbers in, text and PNG out."""
