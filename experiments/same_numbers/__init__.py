"""Is every number unchanged? The same cases with two states of the code, compared step by step: see __main__.py."""
