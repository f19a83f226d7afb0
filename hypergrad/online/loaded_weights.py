"""Whether the weights that a run goes on with are those that a tuner's state was saved beside.

A state holds the norm of every parameter. They are compared at the first step after it was loaded: model, optimizer and tuner may
be loaded in any order. Norms, unlike sums of all weights, are the same within rounding on another device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hypergrad.core.multi_tensor import norms
from hypergrad.core.readout import Readout
from hypergrad.optimizers.transition import Transition

RTOL = 1e-4  # what sums in another order, or a GPU in place of a CPU, stay far below
SAID = (
    "the weights at the first step after tuner.load_state_dict are not those that the state was saved beside: what it keeps, "
    "such as tangents and the best weights, belongs to another point. Load the state_dicts of model and optimizer that were "
    "saved with it too, in any order; to begin anew from other weights give the tuned values to a new optimizer, and make a new "
    "Tuner."
)


class LoadedWeights:
    """Waits for the first step after a state was loaded."""

    def __init__(self, transition: Transition):
        self.transition = transition
        self.expected: Tensor | None = None  # [n_params]; None: nothing to compare

    def sizes(self) -> Tensor:
        """The norm of every parameter [n_params]."""
        return norms([p.detach() for p in self.transition.params])

    def expect(self, sizes: Tensor, written: bool) -> None:
        """A state was loaded.

        Args:
            sizes: what it has kept of the weights.
            written: whether the loop writes to weights itself, so that those at a step may be others than those saved.
        """
        # optimizers without a schedule have other weights in the model while they are saved than while they are trained
        two_kinds = any(callable(getattr(opt, "eval", None)) for opt in self.transition.optimizers)
        self.expected = None if written or two_kinds else sizes

    def ask(self, readout: Readout) -> None:
        if self.expected is None:
            return
        now = self.sizes()
        then, self.expected = self.expected.to(now), None
        rtol = max(RTOL, 8 * max(torch.finfo(p.dtype).eps for p in self.transition.params))
        readout.ask_own("other weights", ((now - then).abs() > rtol * torch.maximum(now, then)).any())  # False for NaN

    @staticmethod
    def said(read: Mapping[str, list[float]]) -> str:
        return SAID if read.get("other weights", [0.0])[0] else ""


def said_of_length(then: int | None, now: int | None) -> str:
    """A sentence, where a state is of a run of another length than the tuner's own."""
    if then == now:
        return ""
    return (
        f"this state is of a run with total_steps={then}, this tuner has total_steps={now}: lr's shape and what is tuned when "
        f"are those of {'a run of unknown length' if now is None else f'{now:,} steps'} from here on. Where that is not meant, "
        "make the tuner with the same total_steps."
    )
