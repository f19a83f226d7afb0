"""Parameters frozen in mid-run: dθ/dφ of what they were trained to before is not zero, and acts on in every later step.

With a the parameters that are trained and f those frozen by `requires_grad_(False)`, z = dθ/dφ:

    dg_a/dφ = H_aa z_a + H_af z_f        dL/dφ = ∂L/∂θ_a z_a + ∂L/∂θ_f z_f

Both need a graph that goes on to θ_f. So while the model, or a module at most DEPTH below it, is called with gradients enabled,
frozen parameters whose tangent is not zero require gradients; on the way out they do not. What the call computes is the same,
and `loss.backward()` leaves them without a gradient, as torch accumulates none into a leaf that does not require it by then. The
hooks that do it go with the tuner.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hypergrad.core.graph import without_hooks
from hypergrad.core.survey import nodes_of, saved_tensors
from hypergrad.online import model_hooks
from hypergrad.online.model_hooks import DEPTH


class FrozenLayers:
    """Which parameters have a tangent, and those of them that are frozen.

    Args:
        params: that the optimizers hold.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor]):
        self.model, self.params = model, list(params)
        self.carries = [False] * len(self.params)  # its tangent may be other than zero
        self.depth = 0  # of calls under way
        self.enabled: list[Tensor] = []  # require gradients in the call under way alone
        self.called = False  # since the last step
        self.remove = weakref.finalize(
            self, model_hooks.remove, model_hooks.hook_calls(self, model_hooks.called(model))
        )

    # ---- which have a tangent

    def trained(self, active: Sequence[bool]) -> None:
        """These parameters have taken a step along which tangents were carried."""
        self.carries = [a or b for a, b in zip(self.carries, active, strict=True)]

    def forget(self) -> None:
        """All tangents are zero."""
        self.carries = [False] * len(self.params)

    def has_tangents(self, theta: Tensor | None) -> None:
        """Tangents [k, n] were loaded."""
        sizes = [p.numel() for p in self.params]
        self.carries = [False] * len(sizes) if theta is None else [bool(x.any()) for x in theta.split(sizes, dim=1)]

    def present(self) -> list[int]:
        """The places of those that have a tangent and are frozen."""
        return [i for i, (p, c) in enumerate(zip(self.params, self.carries, strict=True)) if c and not p.requires_grad]

    # ---- the user's calls of the model

    def enter(self) -> None:
        self.called = True
        if self.depth == 0 and any(self.carries) and torch.is_grad_enabled():
            self.enabled = [self.params[i] for i in self.present()]
            _require(self.enabled, True)
        self.depth += 1

    def leave(self) -> None:
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            self.settle()

    def settle(self) -> None:
        """No call is under way, whatever ended the last one."""
        _require(self.enabled, False)
        self.enabled, self.depth = [], 0

    # ---- what is differentiated

    @contextmanager
    def differentiable(self, places: Sequence[int]) -> Iterator[None]:
        """Let these parameters require gradients, without hooks of the user's that torch would not run on frozen ones."""
        params = [self.params[i] for i in places]
        _require(params, True)
        try:
            with without_hooks(params):
                yield
        finally:
            _require(params, False)

    def in_graph(self, loss: Tensor, leaves: Sequence[Tensor]) -> list[int]:
        """The places of frozen parameters with a tangent that a loss depends on.

        Args:
            leaves: of its graph.

        Raises:
            NotImplementedError: where it depends on one that its graph does not go on to.
        """
        self.settle()
        places = self.present()
        if not places:
            return []
        found = {id(x) for x in leaves}
        missed = [i for i in places if id(self.params[i]) not in found]
        if missed and (not self.called or self._read_by(loss, missed)):
            names = {id(p): name for name, p in self.model.named_parameters()}
            which = ", ".join(names.get(id(self.params[i]), "one of another module") for i in missed)
            raise NotImplementedError(
                f"parameters were frozen in mid-run, and are read outside of a call of the model: {which}. What they were "
                "trained to before depends on the hyperparameters: compute the loss by model(...), or by calls of modules at "
                f"most {DEPTH} below it, or close this tuner and make a new one."
            )
        return [i for i in places if id(self.params[i]) in found]

    def _read_by(self, loss: Tensor, places: Sequence[int]) -> bool:
        """Whether a graph has kept one of these parameters for its backward pass."""
        mine = {self.params[i].untyped_storage().data_ptr() for i in places}
        return any(
            x.untyped_storage().data_ptr() in mine for node in nodes_of(loss.grad_fn) for x in saved_tensors(node)
        )

    def step_done(self) -> None:
        self.called = False


def _require(params: Sequence[Tensor], flag: bool) -> None:
    for p in params:
        p.requires_grad_(flag)
