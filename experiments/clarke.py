r"""The one-pass look-back method of Clarke, Oldewage & Hernández-Lobato (ICLR 2022, arXiv 2110.10461), as a rival.

Every tenth training step s′ = Φ(s, h), s the weights and the optimizer's own tensors, ends in a hyperparameter step:

    L      loss of a validation batch at the weights after the step
    dL/dh  Σ_{j<5} (∂Φ/∂h)ᵀ ((∂Φ/∂s)ᵀ)ʲ ∂L/∂s       both Jacobians at this one step: the update map is taken for a fixed point
    φ      a step of Adam, 0.05, on φ = log₁₀ lr, log₁₀ weight decay, logit momentum

Theirs: the series and its 5 terms, the 10 steps, Adam and its 0.05, the coordinates, an lr without a shape; runs may end in NaN.

Ours: the series comes from `hypergrad.hypergradient(mode="implicit", look_back=5)`, with s all of the optimizer's state, momentum
buffer included, which serves SGD, AdamW and RMSprop alike; each param group has its own values, as in hypergrad. Chosen
without their code at hand: Adam's betas are torch's; the validation batch is the experiment's own, as large as hypergrad's;
hypergradients are not clipped, values have no bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hypergrad

VALUE_OF: dict[str, Callable[[Tensor], Tensor]] = {  # φ → value
    "lr": lambda phi: 10**phi,
    "weight_decay": lambda phi: 10**phi,
    "momentum": torch.sigmoid,
}
PHI_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "lr": torch.log10,
    "weight_decay": torch.log10,
    "momentum": torch.logit,
}


class LookBack:
    """Tunes a live optimizer's values: `look(batch)` before each step on a batch, `move()` after it; training is left as it is.

    Args:
        loss: `loss(model, batch)` → scalar, what the step descends.
        val_loss: `val_loss()` → scalar; what it draws from torch's random numbers is a stream of its own.
        tune: names in param_groups; every value is above 0 (momentum: below 1 too).
        every, look_back, hyper_lr: 10, 5 and 0.05 as published.
        seed: of the validation's random numbers.

    Attributes:
        stats: counts, for flops.gradient_evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Any], Tensor],
        val_loss: Callable[[], Tensor],
        tune: Sequence[str] = ("lr", "weight_decay"),
        every: int = 10,
        look_back: int = 5,
        hyper_lr: float = 0.05,
        seed: int = 0,
    ):
        self.model, self.optimizer, self.loss, self.val_loss = model, optimizer, loss, val_loss
        self.every, self.look_back, self.seed = every, look_back, seed
        self.phi: dict[str, Tensor] = {}
        for name in tune:
            if name not in VALUE_OF:
                raise ValueError(f"tune: no coordinate for {name!r}; there are {', '.join(VALUE_OF)}.")
            start = torch.tensor([float(group[name]) for group in optimizer.param_groups], dtype=torch.float64)
            self.phi[name] = PHI_OF[name](start)
            if not bool(self.phi[name].isfinite().all()):
                raise ValueError(
                    f"{name} starts at {start.tolist()}: a start must lie inside the range of its coordinate."
                )
            self.phi[name].requires_grad_()
        self.adam = torch.optim.Adam(self.phi.values(), lr=hyper_lr)
        self.found: dict[str, Tensor] | None = None  # the hypergradient of the step under way
        self.stats: dict[str, int] = dict.fromkeys(("gradients", "hessian_products", "val_evaluations"), 0)
        self.t = 0

    @property
    def values(self) -> dict[str, Tensor]:
        """Name → value of each param group."""
        return {name: VALUE_OF[name](phi.detach()) for name, phi in self.phi.items()}

    def look(self, batch: Any) -> None:
        """Every tenth step: the hypergradient of the step that is about to be taken on this batch."""
        if (self.t + 1) % self.every or not all(bool(value.isfinite().all()) for value in self.values.values()):
            return  # not finite: the run is lost

        result = hypergrad.hypergradient(
            self.model,
            self.optimizer,
            self.loss,
            [batch],
            self._validation,
            wrt=tuple(self.phi),
            mode="implicit",
            look_back=self.look_back,
        )
        self.found = result.gradients
        self.stats["gradients"] += result.stats["gradient_evaluations"]
        self.stats["hessian_products"] += result.stats["hessian_products"]
        self.stats["val_evaluations"] += 1

    def _validation(self) -> Tensor:
        torch.default_generator.manual_seed(self.seed + self.t)  # hypergradient puts the training's random numbers back
        return self.val_loss()

    def move(self) -> None:
        """After a training step: Adam's step on φ where a hypergradient was found, and the new values."""
        self.t += 1
        self.stats["gradients"] += 1
        if self.found is None:
            return
        self.adam.zero_grad()
        for name, phi in self.phi.items():
            VALUE_OF[name](phi).backward(self.found[name].to(phi))  # dL/dφ = dL/dvalue · dvalue/dφ
        self.adam.step()
        self.found = None
        for name, values in self.values.items():
            for group, value in zip(self.optimizer.param_groups, values.tolist(), strict=True):
                group[name] = value
