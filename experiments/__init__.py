"""Experiments: one file each, one command each, results as JSON."""
