"""Hyperparameters tuned from one whole run to the next."""
