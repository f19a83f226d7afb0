"""Hypergradients of a trajectory: forward, reverse and implicit differentiation."""
