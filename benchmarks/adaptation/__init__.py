"""``python -m benchmarks.adaptation``: a server that learns against others, in one run, with the same prompts."""
