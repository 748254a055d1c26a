"""Causal language models: build, load, save, count, and their losses, fast on CPUs and right everywhere."""
