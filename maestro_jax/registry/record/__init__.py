"""What is written down of requests and calls: journal, replay, cache, counters and caps."""
