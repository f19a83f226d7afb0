"""Tangents that outgrow the weights are cut: training is chaotic there, and a hypergradient along them is no signal.

|z| > CAP |θ|:  z ← z · CAP |θ| / |z|;   a z that is not finite starts again from zero
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hypergrad.core.processes import Processes
from hypergrad.core.readout import Readout
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.optimizers.transition import Tangent

CAP = 2.0  # times the norm of the weights, for a tangent per unit of log value


class TangentCap:
    """Cuts tangents, and notes which.

    On a device the host reads which with the numbers of the next step (`ask`, `note`): at once would be a wait more.

    Args:
        counts: "capped" and "nonfinite_products" are counted here.
    """

    def __init__(self, vector: HyperVector, counts: dict[str, int], processes: Processes):
        self.vector, self.counts, self.processes = vector, counts, processes
        self.hit = torch.zeros(len(vector), dtype=torch.bool)  # tangents that met the cap since `take`
        self.unread: tuple[Tensor, list[int]] | None = None  # flags of the last step, and the numbers that moved then

    # The factor, mostly 1, is multiplied with unseen.
    def bound(self, tangent: Tangent, norm: Tensor, dg: Tensor) -> Tangent:
        """Tangents within the cap, in the memory of these.

        Args:
            norm: of the weights.
            dg: tangents of this step's gradient [k, n], counted where they are not finite themselves.
        """
        norms = torch.linalg.vector_norm(tangent.theta, dim=1)
        within = norms <= CAP * norm  # False for NaN
        at_once = norm.device.type == "cpu" and self.processes.alone
        if at_once and bool(within.all()):
            return tangent
        factor = (CAP * norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        finite = torch.isfinite(norms).unsqueeze(-1)
        flags = torch.stack([~within, factor < 1, ~torch.isfinite(dg).all(1)])
        factor = factor.unsqueeze(-1)
        for x in (tangent.theta, *tangent.slots.values()):
            x.mul_(factor).masked_fill_(~finite, 0)
        self._flush()
        self.unread = flags, self.vector.moving
        if at_once:
            self._flush()
        return tangent

    def ask(self, readout: Readout) -> None:
        """Ask whether the last step's tangents met the cap; to be noted with `note`."""
        if self.unread is not None:
            readout.ask("hits", self.unread[0])

    def note(self, read: Mapping[str, list[float]]) -> None:
        if self.unread is not None and "hits" in read:
            over, hit, no_product = torch.tensor(read["hits"], dtype=torch.float64).view(3, -1).bool()
            self.counts["capped"] += bool(over.any())
            self.counts["nonfinite_products"] += bool(no_product.any())
            self.hit[self.unread[1]] |= hit
            self.unread = None

    def _flush(self) -> None:
        """The same at once."""
        if self.unread is not None:
            readout = Readout(self.processes)
            self.ask(readout)
            self.note(readout.fetch())

    def take(self) -> Tensor:
        """Which numbers' tangents met the cap since the last call [k of all]."""
        self._flush()
        hit, self.hit = self.hit, torch.zeros_like(self.hit)
        return hit

    def state(self) -> Tensor:
        """Which have met it so far. It may be asked for on one process alone."""
        if self.processes.alone:
            self._flush()
        hit = self.hit.clone()
        if self.unread is not None:
            hit[self.unread[1]] |= self.unread[0][1].cpu()
        return hit

    def load(self, hit: Tensor) -> None:
        self.hit, self.unread = hit.clone(), None
