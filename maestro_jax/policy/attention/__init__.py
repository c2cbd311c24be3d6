"""Attention of whole sequences and of decoding: one interface, several implementations."""
