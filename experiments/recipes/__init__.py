"""Scripts to copy from, each of which the tests run: docs/recipes.md, and docs/integrations.md for other packages' loops."""
