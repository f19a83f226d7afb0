"""Tangents that ride on a live loop: dθ/dφ and ds/dφ, kept up with every step the user's own optimizer takes.

Between `backward` and `optimizer.step()` the gradients may have been unscaled or clipped. What was done to them is read
off by comparing p.grad with what `backward` left there:

    g' = g                     J = I
    g' = g/scale               J = I/scale                               with `scaler`
    g' = c g, c < 1            J = c (I − g gᵀ/(N (N + ε)))              with `clip_norm`, N = ‖g‖, c = M/(N + ε)
    anything else              unknown: the tangents start again from zero
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypergrad.coordinates import Coordinates
from hypergrad.graph import Linearization, grad_or_none, survey
from hypergrad.secant import Secant
from hypergrad.updates.binding import State, Values
from hypergrad.updates.clip import TORCH_EPS, total_norm
from hypergrad.updates.transition import Tangent, Transition

CAP = 2.0  # a tangent (per unit of log value) is not let grow beyond so many times the norm of the weights
AVERAGE_SHARE = 0.1  # the running average looks back over so much of the run so far


@dataclass
class Pending:
    """What `backward` left for the step to use."""

    left: list[Tensor | None]  # a copy of every p.grad
    dg: Tensor | None  # tangent of the gradient [k, n]; None is zero
    loss: Tensor  # the largest of the accumulated losses, times scale
    scale: float  # of a GradScaler at the time
    stepped: set[int] = field(default_factory=set)  # the optimizers that have used it
    changed: set[int] = field(default_factory=set)  # parameters whose gradient was changed before more was added to it


class Tangents:
    """The forward mode of a live loop."""

    def __init__(
        self,
        transition: Transition,
        coordinates: Coordinates,
        model: torch.nn.Module,
        scaler: Any,
        clip_norm: Any,
        secant: Secant | None = None,
    ):
        self.transition, self.coordinates, self.model = transition, coordinates, model
        self.scaler, self.clip_norm, self.secant = scaler, clip_norm, secant  # None: every product is formed
        self.tangent: Tangent | None = None  # None: zero
        self.average: Tensor | None = None  # θ̄ [n]
        self.average_tangent: Tensor | None = None  # dθ̄/dφ [k, n]; None: zero
        self.pending: Pending | None = None
        self.hit = torch.zeros(len(coordinates), dtype=torch.bool)  # tangents that met the cap since `take_hits`
        self.along: Tensor | None = None  # a = gᵀz and B = zᵀHz, summed since `take_newton`; z = dθ/dlog lr [m, 1 + m]
        self.counts = {"gradients": 0, "hessian_products": 0, "capped": 0}
        self._own = {id(x) for x in [*transition.params, *coordinates.hypers.values()]}

    # ---- the gradient stage

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None, retain_graph: bool) -> None:
        """Fill every leaf's .grad as `loss.backward()` would, and form the gradient's tangent."""
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        params, hypers = self.transition.params, list(self.coordinates.hypers.values())
        found = survey(loss, self.model)
        others = [x for x in (found.leaves if inputs is None else inputs) if id(x) not in self._own]
        k = len(self.coordinates.moving)
        due = list(range(k)) if self.secant is None else self.secant.due(self.counts["gradients"], k)
        products = bool(due) and (self.tangent is not None or bool(hypers))
        plain = None
        if products and not found.exact:  # one pass more, for a gradient that is torch's to the last bit
            plain = grad_or_none([loss], [*params, *others], retain_graph=True)
        lin = Linearization(loss, params, [*hypers, *others], products, retain_graph)
        dg = self._gradient_tangent(lin, len(others), retain_graph, due) if products else None
        if self.secant is not None and self.tangent is not None:
            dg = self.secant.completed(self.tangent.theta, dg, due, scale)
        grads = plain or [*lin.grads, *lin.extra_grads[len(hypers) :]]
        if inputs is not None:
            chosen = {id(x) for x in inputs}
            grads = [g if id(x) in chosen else None for x, g in zip([*params, *others], grads, strict=True)]
        self._drop_zeroed()
        _accumulate([*params, *others], grads)
        self.counts["gradients"] += 1
        self.pending = self._joined(grads[: len(params)], lin.loss, dg, scale)

    def _joined(self, grads: Sequence[Tensor | None], loss: Tensor, dg: Tensor | None, scale: float) -> Pending:
        """This backward added to what earlier ones of the same step left."""
        old, params = self.pending, self.transition.params
        if old is None:
            return Pending([None if g is None else g.detach() for g in grads], dg, loss, scale)
        if old.dg is not None:
            dg = old.dg if dg is None else old.dg + dg
        pairs = zip(params, grads, old.left, strict=True)
        left = [None if p.grad is None or (g is None and x is None) else p.grad.clone() for p, g, x in pairs]
        return Pending(left, dg, loss if old.stepped else torch.maximum(old.loss, loss), scale, changed=old.changed)

    def _gradient_tangent(
        self, lin: Linearization, n_others: int, retain_graph: bool, due: Sequence[int]
    ) -> Tensor | None:
        transition, directions = self.transition, self.coordinates.tuned
        slope = self.coordinates.slope()[self.coordinates.moving].tolist() if self.coordinates.hypers else []
        jobs = []
        for j in due:
            extra = directions.into_loss(j, 0)
            if extra is not None:
                extra = [None if x is None else x * slope[j] for x in extra] + [None] * n_others
            if extra is not None or self.tangent is not None:
                jobs.append((j, extra))
        rows: dict[int, Tensor] = {}
        nothing: list[Tensor | None] = [None] * len(transition.params)
        for i, (j, extra) in enumerate(jobs):
            z = nothing if self.tangent is None else transition.split(self.tangent.theta[j])
            product = lin.jvp(z, extra, retain=retain_graph or i + 1 < len(jobs))
            rows[j] = transition.flatten(product)
        self.counts["hessian_products"] += len(jobs)
        if not retain_graph and all(g is None or not g.requires_grad for g in lin.grads):
            lin.free()
        if not rows:
            return None
        zero = torch.zeros_like(next(iter(rows.values())))
        return torch.stack([rows.get(j, zero) for j in range(len(directions))])

    def _drop_zeroed(self) -> None:
        """Gradients zeroed since the last backward: their share of what was accumulated is void.

        So after every step, after one that GradScaler skipped, and where optimizers take turns.
        """
        pending = self.pending
        if pending is None:
            return
        grads = [p.grad for p in self.transition.params]
        telling = [i for i, x in enumerate(pending.left) if x is not None and (grads[i] is None or bool(x.any()))]
        void = [i for i in telling if grads[i] is None or not bool(grads[i].any())]  # type: ignore[union-attr]
        if len(void) == len(telling):
            self.pending = None
            return
        for i in void:
            pending.left[i] = None
        pending.changed -= set(void)
        pending.changed |= {i for i in set(telling) - set(void) if not _same(grads[i], pending.left[i])}
        if pending.dg is not None and void:
            pending.dg = pending.dg.clone()
            for i in void:
                a, b = self.transition.ranges[i]
                pending.dg[:, a:b] = 0

    # ---- the transition stage

    def seen(self, active: Sequence[bool]) -> Tensor | None:
        """The tangent of the gradients as the optimizer will see them [k, n]; None where that is not known.

        Rows are right in the ranges of the active parameters, those of the optimizer that is about to step.
        """
        pending, params = self.pending, self.transition.params
        if pending is None:
            return None
        if not pending.changed.isdisjoint(i for i, a in enumerate(active) if a):
            return None
        dg = pending.dg
        if dg is None:
            dg = params[0].new_zeros(len(self.coordinates.moving), sum(self.transition.sizes))
        if all(_same(p.grad, left) for p, left, a in zip(params, pending.left, active, strict=True) if a):
            return dg
        g = self.transition.flatten([p.grad if a else None for p, a in zip(params, active, strict=True)])
        ref = self.transition.flatten(pending.left) / pending.scale
        mine = self.transition.flatten([torch.full_like(p, float(a)) for p, a in zip(params, active, strict=True)])
        return self._through_scaling(g, ref, mine, dg / pending.scale)

    def _through_scaling(self, g: Tensor, ref: Tensor, mine: Tensor, dg: Tensor) -> Tensor | None:
        """J dg for a gradient g = c·ref in the ranges where `mine` is 1; a norm is that of the whole ref."""
        rtol, part = 64 * torch.finfo(g.dtype).eps, ref * mine
        square = part @ part
        if not bool(torch.isfinite(square)) or square == 0:
            return None
        c = (g @ part) / square
        if not torch.allclose(g, c * part, rtol=rtol, atol=float(rtol * part.abs().amax() * c.abs())):
            return None
        if self.scaler is not None and abs(c - 1) < rtol:
            return dg
        if self.clip_norm is None or c > 1 + rtol or self.pending is None or self.pending.changed:
            return None
        n = total_norm(ref, self.transition.sizes)
        if abs(c * (n + TORCH_EPS) / float(self.clip_norm) - 1) > rtol:
            return None  # clipped at another threshold, or over other parameters too
        return torch.addcmul(c * dg, (dg @ ref).unsqueeze(-1) * (-c / (n * (n + TORCH_EPS))), ref)

    def push(
        self, state: State, g: Tensor, active: tuple[bool, ...], values: Values, scale: Tensor, dg: Tensor | None
    ) -> None:
        """Take the tangents through one step. dg None: unknown, so they start again from zero at this step."""
        directions = self.coordinates.tuned
        if not len(directions):
            return self.forget()
        if self.tangent is None or dg is None:
            self.forget()
            self.tangent = Tangent.zeros(state, len(directions))
        dg = torch.zeros_like(self.tangent.theta) if dg is None else dg
        for name, x in state.slots.items():  # a slot that a group has begun to keep
            if name not in self.tangent.slots:
                self.tangent.slots[name] = x.new_zeros(len(directions), x.numel())
        seeds, _ = directions.seeds(0, scale[self.coordinates.moving].to(state.theta))
        self.tangent = self.transition.jvp(state, g, active, values, self.tangent, dg, seeds)
        if self.secant is not None:
            self.tangent = self.secant.faded(self.tangent)
        return self._bound(torch.linalg.vector_norm(state.theta))

    def _bound(self, norm: Tensor) -> None:
        """Cap every tangent at CAP times the norm of the weights; one that is not finite starts again from zero."""
        assert self.tangent is not None
        norms = torch.linalg.vector_norm(self.tangent.theta, dim=1)
        if all(x <= CAP * float(norm) for x in norms.tolist()):  # False for NaN
            return
        factor = (CAP * norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        self.counts["capped"] += 1
        self.hit[self.coordinates.moving] |= (factor < 1).cpu()
        finite = torch.isfinite(norms).unsqueeze(-1)
        factor = factor.unsqueeze(-1)
        bound = {name: torch.where(finite, x * factor, 0) for name, x in self.tangent.slots.items()}
        self.tangent = Tangent(torch.where(finite, self.tangent.theta * factor, 0), bound)

    def along_lr(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """z = dθ/dlog lr of every lr [m, n], and the pending batch's own g [n] and Hz [m, n]; None where these are not known."""
        pending, rows = self.pending, self.coordinates.rows("lr")
        if self.tangent is None or pending is None or pending.dg is None or not rows:
            return None
        g = self.transition.flatten(pending.left)
        return self.tangent.theta[rows], g / pending.scale, pending.dg[rows] / pending.scale

    def look(self) -> None:
        """Add this step's batch to a and B: slope and curvature of its own loss, whatever is done to its gradient afterwards."""
        seen, signs = self.along_lr(), {bool(getattr(rule, "maximize", False)) for rule in self.transition.rules}
        if seen is None or len(signs) > 1:
            return
        z, g, hz = seen
        along = torch.cat([(z @ g).unsqueeze(-1), z @ hz.T], dim=1)
        along = -along if self.transition.maximizes else along
        self.along = along if self.along is None else self.along + along

    def take_newton(self) -> Tensor:
        """log c* of every lr by the steps since the last call (see descent.py) [k of all]; NaN where it is not known."""
        newton = torch.full((len(self.coordinates),), math.nan, dtype=torch.float64)
        along, self.along = self.along, None
        if along is None:
            return newton
        a, b = along.to("cpu", torch.float64).tensor_split([1], dim=1)
        a, b = a.squeeze(1), b.diagonal() + (b - b.diagonal().diag()).abs().sum(1)
        best = torch.where(a >= 0, 0, torch.where(b > 0, torch.log1p(-a / b), math.inf))
        newton[[self.coordinates.moving[k] for k in self.coordinates.rows("lr")]] = torch.where(
            (a + b).isfinite(), best, math.nan
        )
        return newton

    def take_hits(self) -> Tensor:
        """Which numbers' tangents met the cap since the last call [k of all]. Those start again from zero."""
        hit, self.hit = self.hit, torch.zeros_like(self.hit)
        if self.tangent is not None and bool(hit.any()):
            keep = (~hit[self.coordinates.moving]).to(self.tangent.theta).unsqueeze(-1)
            slots = {name: x * keep for name, x in self.tangent.slots.items()}
            self.tangent = Tangent(self.tangent.theta * keep, slots)
            if self.average_tangent is not None:
                self.average_tangent = self.average_tangent * keep
        return hit

    def forget(self) -> None:
        """Tangents are zero from here on."""
        self.tangent = self.average_tangent = self.along = None

    # θ̄ ← θ̄ + a (θ − θ̄) and the same for its tangent, a = 1/(share of the steps so far)
    def follow(self, theta: Tensor, t: int) -> None:
        """Move the running averages towards the present weights and tangents."""
        a = min(1.0, 1 / (AVERAGE_SHARE * (t + 1)))
        self.average = theta if self.average is None else self.average.lerp(theta, a)
        if self.tangent is not None:
            old = self.average_tangent
            self.average_tangent = self.tangent.theta * a if old is None else old.lerp(self.tangent.theta, a)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running average of the weights in the model, and the weights themselves back on the way out."""
        theta = self.transition.flatten(self.transition.params)
        if self.average is not None:
            self.transition.load(self.average)
        try:
            yield
        finally:
            self.transition.load(theta)

    def state_dict(self) -> dict[str, Any]:
        tangent = self.tangent
        return {
            "theta": None if tangent is None else tangent.theta,
            "slots": None if tangent is None else dict(tangent.slots),
            "average": self.average,
            "average_tangent": self.average_tangent,
            "along": self.along,
            "hit": self.hit.clone(),
            **({} if self.secant is None else {"secant": self.secant.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        like = self.transition.params[0]

        def here(x: Any) -> Any:
            return None if x is None else x.to(like)

        self.tangent = None
        if state["theta"] is not None:
            self.tangent = Tangent(here(state["theta"]), {name: here(x) for name, x in state["slots"].items()})
        self.average, self.average_tangent = here(state["average"]), here(state["average_tangent"])
        self.along, self.hit = here(state["along"]), state["hit"].clone()
        if self.secant is not None:
            self.secant.load_state_dict(state["secant"], like)
        self.pending = None


def _same(grad: Tensor | None, left: Tensor | None) -> bool:
    if grad is None or left is None:
        return grad is left or (grad is not None and not bool(grad.any()))  # not used in the loss; zeros were kept
    return torch.equal(grad, left)


def _accumulate(leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add to .grad what backward() would; fresh tensors, so that nothing in the graph or of the user's is shared."""
    with torch.no_grad():
        for leaf, g in zip(leaves, grads, strict=True):
            if g is None:
                continue
            if leaf.grad is None:
                leaf.grad = g.detach().clone()
            else:
                leaf.grad.add_(g.detach())
            for hook in (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(leaf)
