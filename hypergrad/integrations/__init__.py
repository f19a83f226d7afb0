"""Tuners inside other packages' training loops: one module each, which imports its package when it is imported (docs/integrations.md)."""
