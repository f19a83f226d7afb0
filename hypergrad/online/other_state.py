"""What training changes in a model beside the optimizer's parameters: a momentum encoder, a queue, u and v of a spectral norm.

Where the loss reads it, weights act through it on later gradients, and that path is in no graph. BatchNorm's running statistics,
which only a validation in eval mode reads, have a sentence of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hypergrad.core.multi_tensor import norms
from hypergrad.core.readout import Readout

SHOWN = 4  # names in the sentence


class OtherState:
    """Tells once, after the first `after` steps, what has changed.

    Args:
        held: the parameters that the optimizers hold.
    """

    def __init__(self, model: torch.nn.Module, held: Sequence[Tensor], after: int):
        mine = {id(p) for p in held}
        self.places = [
            (module, name, f"{path}.{name}".lstrip("."))
            for path, module in model.named_modules()
            for name, x in [*module._parameters.items(), *module._buffers.items()]
            if x is not None and x.is_floating_point() and id(x) not in mine and not isinstance(module, _BatchNorm)
        ]
        self.after, self.since = after, 0
        self.before: Tensor | None = None

    def ask(self, t: int, readout: Readout) -> None:
        """Before step t: look, for the first time, or for the second."""
        if not self.places:
            return
        if self.before is None:
            self.before, self.since = self._sizes(), t
        elif t >= self.since + self.after:
            readout.ask("other state", self._sizes() != self.before)

    def said(self, read: Mapping[str, list[float]]) -> str:
        """A sentence, where something has changed."""
        if "other state" not in read:
            return ""
        names = [name for (*_, name), flag in zip(self.places, read["other state"], strict=True) if flag]
        self.places = []
        if not names:
            return ""
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        return (
            f"training changes {shown} of the model, which the optimizer does not hold: as far as losses read them, the path "
            "from the weights through them is not part of the hypergradients. hypergrad.check tells how far off they are."
        )

    def _sizes(self) -> Tensor:
        tensors = [getattr(module, name, None) for module, name, _ in self.places]
        device = next((x.device for x in tensors if x is not None), None)
        gone = torch.zeros(1, device=device)  # a mask that was taken off
        return norms(
            [gone if x is None else x.detach() for x in tensors], 1
        )  # what is normalised keeps its norm of order 2
