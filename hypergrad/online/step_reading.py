"""What the host has to know before a step, in one wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.core.readout import Readout
from hypergrad.online.accumulation import ask_whether_mean
from hypergrad.online.gradient_changes import Comparison, Pending
from hypergrad.online.loaded_weights import LoadedWeights
from hypergrad.online.lr_searches import LrSearches
from hypergrad.online.other_state import OtherState
from hypergrad.online.step_gradients import StepGradients
from hypergrad.online.tangents import Tangents


class StepReading:
    """Asks for it.

    Args:
        search: lr's warm starts.
        forward: whether tangents are carried along.
    """

    def __init__(self, tangents: Tangents, search: LrSearches, other: OtherState, forward: bool):
        self.tangents, self.search, self.other, self.forward = tangents, search, other, forward
        self.transition = tangents.transition
        self.loaded = LoadedWeights(self.transition)

    def take(
        self,
        i: int,
        t: int,
        gradients: StepGradients,
        fresh: Pending | None,
        loss: Tensor | None,
        begins: bool,
        void: bool,
    ) -> tuple[Comparison | None, dict[str, list[float]]]:
        """Before step t of optimizer i.

        Args:
            gradients: that it will see.
            fresh: what `backward` left, where this optimizer has not used it yet.
            loss: of the step.
            begins: whether no optimizer has taken the step yet, and it was not judged to do nothing.
            void: whether it was.

        Returns:
            what tells whether gradients were changed, and the numbers by name.
        """
        readout, tangents, comparison = Readout(self.tangents.processes), self.tangents, None
        ask_whether_mean(fresh, readout)
        found_inf = getattr(self.transition.optimizers[i], "found_inf", None)
        if found_inf is not None:
            readout.ask("found_inf", found_inf)
        for name, tensors in (
            ("numbers", self.transition.numbers_on_device()),
            ("counts", self.transition.counters(on_device=True)),
        ):
            if tensors:
                readout.ask_own(name, torch.stack([x.reshape(()) for x in tensors.values()]))
        tangents.cap.ask(readout)
        tangents.written.ask(readout)
        self.loaded.ask(readout)
        if self.forward:
            self.other.ask(t, readout)
        if loss is not None:
            readout.ask("loss", loss)
        if fresh is not None and self.search.of(i).active:
            if begins and not self.search.apart:
                tangents.curvature.ask_common(tangents.tangent, fresh, readout, None)
            elif self.search.apart and not void and not self.search.begins(i):
                tangents.curvature.ask_common(tangents.tangent, fresh, readout, i)
        gradients.ask(readout)
        if gradients.flat is not None:
            comparison = tangents.compare(gradients.flat, gradients.active, readout)
        read = readout.fetch()
        if comparison is not None:
            comparison.keep_one(read)
            comparison.note_clipping(read)
        return comparison, read
