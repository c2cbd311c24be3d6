"""What each command does, as one linear function: config in, files and typed results out."""
