"""Tuners inside other packages' training loops (docs/integrations.md): one module a package, which only that module imports."""
