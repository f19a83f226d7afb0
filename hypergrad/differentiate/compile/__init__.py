"""A training step, its adjoint and its tangents as compiled graphs."""
