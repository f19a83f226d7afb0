"""Whether `optimizer.step()` is called again with the gradients that it has stepped with already.

A gradient is the same one while it is the same tensor and nothing was written into it: its version counter says so, without a
look at its numbers. One parameter of each optimizer stands for all: a backward pass, or `zero_grad`, writes to every one.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hypergrad.optimizers.transition import Transition


class SteppedGradients:
    """The gradients from `tuner.backward` that each optimizer last stepped with; their memory is not held."""

    def __init__(self, transition: Transition):
        self.transition = transition
        self.places: dict[int, int] = {}  # optimizer → the parameter that stands for all; of the step under way
        # optimizer → that of its last step, gradient, version
        self.last: dict[int, tuple[int, TensorWeakRef, int]] = {}

    def again(self, i: int) -> bool:
        """Whether optimizer i is about to step with them once more."""
        if i not in self.last:
            return False
        place, ref, version = self.last[i]
        grad = self.transition.params[place].grad
        return grad is not None and grad is ref() and grad._version == version

    def about_to(self, i: int, ours: bool, gradients: list[Tensor]) -> None:
        """Optimizer i is about to step. ours: with gradients from `tuner.backward`."""
        self.last.pop(i, None)
        self.places.pop(i, None)
        if ours and gradients:
            first = gradients[0]
            self.places[i] = next(n for n, p in enumerate(self.transition.params) if p.grad is first)

    def stepped(self, i: int) -> None:
        """Optimizer i has stepped, which may itself have written into its gradients (a fused one unscales them)."""
        place = self.places.pop(i, None)
        grad = None if place is None else self.transition.params[place].grad
        if place is not None and grad is not None:
            self.last[i] = place, TensorWeakRef(grad), grad._version
