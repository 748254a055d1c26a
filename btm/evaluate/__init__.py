"""Measure models and ensembles on held-out documents, and show the result."""
