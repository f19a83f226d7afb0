"""Finite differences of a user's own loop in float64."""
