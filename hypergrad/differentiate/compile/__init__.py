"""A training step, its vjp and its jvp as compiled graphs."""
