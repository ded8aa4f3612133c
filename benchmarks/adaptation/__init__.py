"""``python -m benchmarks.adaptation``: compares a server that learns with others, in one run, on the same prompts."""
