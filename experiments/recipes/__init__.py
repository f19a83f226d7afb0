"""A tuner in other packages' training loops: one script each, to copy from (docs/integrations.md)."""
