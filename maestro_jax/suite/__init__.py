"""The demonstration: tasks, specialists that answer them, and a weak router that shows a tiny policy how to call."""
