"""Forward mode on a live loop: dθ/dφ and ds/dφ, taken through every step of the user's own optimizer.

Between `backward` and `optimizer.step()` the gradients may have been unscaled or clipped. What was done to them is found
by comparing p.grad with what `backward` left there (gradient_changes.py). Nothing here waits for the device: what the host
has to know is asked of a `Readout`, which the loop fetches once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.data_parallel import check_now
from hypergrad.core.detached import is_cut
from hypergrad.core.graph import Linearization, grad_or_none
from hypergrad.core.problem import Problem
from hypergrad.core.processes import ALONE, Processes
from hypergrad.core.readout import Readout
from hypergrad.core.second_order import twice_differentiable
from hypergrad.core.survey import survey
from hypergrad.online.accumulation import accumulate, expected, found
from hypergrad.online.calibration import Calibration
from hypergrad.online.forward_switch import ForwardSwitch
from hypergrad.online.frozen_layers import FrozenLayers
from hypergrad.online.gradient_changes import Comparison, Pending, carried_on, reached
from hypergrad.online.gradient_tangent import gradient_tangent
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.lr_curvature import LrCurvature
from hypergrad.online.plain_backward import without_tangents
from hypergrad.online.product_weight import HEAVY, heaviest, weighted
from hypergrad.online.tangent_cap import TangentCap
from hypergrad.online.weight_average import WeightAverage
from hypergrad.online.written_weights import WrittenWeights
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.transition import Tangent, Transition


class Tangents:
    """The forward mode of a live loop."""

    def __init__(
        self,
        transition: Transition,
        vector: HyperVector,
        problem: Problem,
        scaler: Any,
        clip: tuple[str | None, float],
        calibration: Calibration,
        processes: Processes = ALONE,
    ):
        self.processes, self.calibration = processes, calibration
        self.transition, self.vector, self.model = transition, vector, problem.model
        self.scaler, self.clip = scaler, clip  # clip: its name and threshold
        self.frozen = FrozenLayers(problem.model, transition.params)
        self.tangent: Tangent | None = None  # None: zero
        self.average = WeightAverage(transition)
        self.pending: Pending | None = None
        self.stride, self.skipping = 1, False  # products come in one step of so many; the present one is without
        self.curvature, self.written = LrCurvature(vector), WrittenWeights()
        self.counts = {"gradients": 0, "hessian_products": 0, "capped": 0, "nonfinite_products": 0}
        self.cap = TangentCap(vector, self.counts, processes)
        self.read: set[str] = set()  # names of tensors in the loss that a loss depended on
        self.cut = False  # see `is_cut`, of the first loss
        self.forward = ForwardSwitch(problem, self.products_due)
        if vector.hypers:  # their products are due from the first step on
            self.forward.attach()
        self._own = {id(x) for x in [*transition.params, *vector.hypers.values()]}

    @property
    def resting(self) -> bool:
        """Whether the backward pass of this step is a plain one: nothing is tuned, or it is one without a product."""
        return not self.vector.moving or (self.skipping and self.tangent is not None)

    # ---- the gradient stage

    def products_due(self) -> bool:
        """Whether the next gradient is one with a product."""
        return not self.resting and (self.tangent is not None or bool(self.vector.hypers))

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None, retain_graph: bool, whole: bool = False) -> None:
        """Fill every leaf's .grad as `loss.backward()` would, and form the gradient's tangent.

        whole: of a step that `tuner.step` takes; the mean over processes is then taken here.
        """
        check_now(self.processes)
        self.forward.settle()
        params, hypers = self.transition.params, list(self.vector.hypers.values())
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        if self.resting and self.counts["gradients"] and (self.processes.alone or not whole):
            if self.tangent is not None:
                self.forget_written(self.written.weights(self.transition))
            self.pending = without_tangents(loss, self.pending, self.transition, scale)
            self.counts["gradients"] += 1
            if inputs is None and hypers:  # whose .grad stays as it is
                inputs = [x for x in survey(loss).leaves if id(x) not in {id(y) for y in hypers}]
            return loss.backward(inputs=inputs, retain_graph=retain_graph)
        if all(p.grad is None for p in params):  # of no use, and large
            self.pending = None
        graph = survey(loss, self.model)
        self.note_read(graph.leaves)
        if not self.counts["gradients"]:
            self.cut = is_cut(loss)
        others = [x for x in (graph.leaves if inputs is None else inputs) if id(x) not in self._own]
        if graph.compiled:
            self.forward.check_compiled()
        if graph.once:
            self.forward.attach()
        self.forget_written(self.written.weights(self.transition))
        products = self.products_due() and (self.forward.allowed or not graph.once)
        # what has no second derivative is refused before any step
        trial = not products and self.counts["gradients"] == 0 and not graph.once and not self.forward.attached
        products, plain = products or trial, None
        frozen = self.frozen.in_graph(loss, graph.leaves)
        if products and not graph.exact:  # one pass more, for a gradient that is torch's to the last bit
            with twice_differentiable() if self.forward.attached else nullcontext():
                plain = grad_or_none([loss], [*params, *others], retain_graph=True)
        with self.frozen.differentiable(frozen):
            lin = Linearization(
                loss, params, [*hypers, *others], products, retain_graph, products and self.forward.attached
            )
            dg = None
            if products and not trial:
                dg, formed = gradient_tangent(
                    lin, self.vector, self.transition, self.tangent, len(others), retain_graph
                )
                self.counts["hessian_products"] += formed
            if trial:
                lin.jvp(lin.grads, retain=retain_graph)
            if products and not retain_graph and all(g is None or not g.requires_grad for g in lin.grads):
                lin.free()
        grads = plain or [*lin.grads, *lin.extra_grads[len(hypers) :]]
        coupled = len(reached(self.transition, [g is not None for g in grads[: len(params)]])) > 1
        chosen = None if inputs is None else {id(x) for x in inputs}
        left_out = {id(params[i]) for i in frozen}  # their gradients are none, and stay so
        for i, x in enumerate([*params, *others]):
            if id(x) in left_out or (chosen is not None and id(x) not in chosen):
                grads[i] = None
                if dg is not None and i < len(params):
                    dg[:, slice(*self.transition.ranges[i])] = 0
        old = None if self.pending is None else carried_on(self.pending, self.transition)
        value = lin.loss
        del lin, plain
        if whole and not self.processes.alone:
            grads[: len(params)] = self.processes.means(grads[: len(params)], params)
        has = tuple(g is not None for g in grads[: len(params)])
        self.counts["gradients"] += 1
        left = self.transition.flatten(grads[: len(params)])
        for i, (p, g) in enumerate(zip(params, self.transition.split(left), strict=True)):
            if grads[i] is not None and p.is_contiguous():
                grads[i] = g  # the same numbers: autograd's own need not stay in memory
        losses = {reached(self.transition, has): value}
        new = Pending(left, has, dg, losses, scale, coupled=coupled)
        new = expected(new, old, self.transition, self.processes)
        new = new if old is None else old.joined(new)
        if self.processes.alone:
            self.pending = new  # before, as a hook may take the step
        accumulate([*params, *others], grads)
        if not self.processes.alone:
            self.pending = found(new, self.transition)
        return None

    def average_pending(self) -> None:
        """Make the tangent of the gradient that waits the mean of the processes': one collective a step."""
        pending = self.pending
        if pending is not None and pending.dg is not None and not pending.averaged:
            pending.dg, pending.averaged = self.processes.mean_(pending.dg), True

    def note_read(self, leaves: Sequence[Tensor]) -> None:
        """Note which tensors in the loss are among the leaves of a loss's graph."""
        if len(self.read) < len(self.vector.hypers):
            found = {id(x) for x in leaves}
            self.read |= {name for name, x in self.vector.hypers.items() if id(x) in found}

    def forget_written(self, theta: Tensor) -> None:
        """Tangents of elements of the weights [n] that were written by hand are zero."""
        same = self.written.kept(theta)
        if same is not None and self.tangent is not None:
            self.tangent = Tangent(torch.where(same, self.tangent.theta, 0), self.tangent.slots)

    def note_weights(self) -> None:
        """The weights are as a step has left them."""
        if self.tangent is None:
            self.written.forget()
        else:
            self.written.note(lambda: self.transition.flatten(self.transition.params))

    def count(self, gradients: int, hessian_products: int) -> None:
        """Count what was evaluated elsewhere, for `tuner.stats`."""
        self.counts["gradients"] += gradients
        self.counts["hessian_products"] += hessian_products

    # ---- the transition stage

    def compare(self, g: Tensor, active: Sequence[bool], readout: Readout) -> Comparison | None:
        """Ask what was done to the gradients [n] between `backward` and the step; None where none of them are from there."""
        if self.pending is None or self.pending.left is None:
            return None
        return Comparison(self.pending, self.transition, g, active, self.clip, self.scaler is not None, readout)

    def of_gradient(self, comparison: Comparison | None, read: Mapping[str, list[float]]) -> Tensor | None:
        """The tangent of the gradient that a step is taken with [k, n]: 0 in one without a product; None: not known."""
        if self.resting and self.tangent is not None:
            return torch.zeros_like(self.tangent.theta)
        return None if comparison is None else comparison.tangent(read, len(self.vector.moving))

    def push(
        self, state: State, g: Tensor, active: tuple[bool, ...], values: Values, scale: Tensor, dg: Tensor | None
    ) -> None:
        """Take the tangents through one step, in their memory. dg None: unknown, so they start again from zero at this step."""
        directions = self.vector.tuned
        if not len(directions):
            self.forget()
            return
        if self.tangent is None or dg is None:
            self.forget()
            self.tangent = Tangent.zeros(state, len(directions))
        dg = torch.zeros_like(self.tangent.theta) if dg is None else dg
        for name, x in state.slots.items():  # a slot that a group has begun to keep
            if name not in self.tangent.slots:
                self.tangent.slots[name] = state.theta.new_zeros(len(directions), x.numel())
        seeds, _ = directions.seeds(0, scale[self.vector.moving].to(state.theta))
        if self.stride > 1 and not self.resting and heaviest(values) > HEAVY:
            dg = weighted(dg, self.stride, self.transition, (state, g, active, values), self.tangent, seeds)
        self.tangent = self.transition.jvp(state, g, active, values, self.tangent, dg, seeds, in_place=True)
        self.frozen.trained(active)
        self.tangent = self.cap.bound(self.tangent, torch.linalg.vector_norm(state.theta), dg)

    def take_hits(self) -> Tensor:
        """Which numbers' tangents met the cap since the last call [k of all]. Those start again from zero."""
        hit = self.cap.take()
        if self.tangent is not None and bool(hit.any()):
            keep = (~hit[self.vector.moving]).to(self.tangent.theta).unsqueeze(-1)
            slots = {name: x * keep for name, x in self.tangent.slots.items()}
            self.tangent = Tangent(self.tangent.theta * keep, slots)
            if self.average.tangent is not None:
                self.average.tangent = self.average.tangent * keep
        return hit

    def forget(self, also_pending: bool = False) -> None:
        """Tangents are zero from here on; `also_pending`: so is that of a gradient which waits for its step."""
        self.tangent = self.average.tangent = None
        self.curvature.forget()
        self.frozen.forget()
        if also_pending and self.pending is not None:
            self.pending.forget_tangent()

    def copied(self) -> Tangent | None:
        """The tangents in memory of their own, which later steps do not write into."""
        tangent = self.tangent
        if tangent is None:
            return None
        return Tangent(tangent.theta.clone(), {name: x.clone() for name, x in tangent.slots.items()})

    def take_again(self, before: Tangent | None) -> None:
        """The last step is to be taken through once more, from these tangents."""
        if before is None:
            self.forget()
        self.tangent = before
        self.tangent = self.copied()  # `before` may be wanted once more

    def start_again(self) -> None:
        """Tangents are zero, and the running average of the weights starts again: training goes on from other weights."""
        self.forget(also_pending=True)
        self.average.theta = None

    def drop_pending(self) -> None:
        """The gradient that waits for its step will not be used."""
        self.pending = None

    def load_counts(self, stats: Mapping[str, int]) -> None:
        self.counts.update({k: v for k, v in stats.items() if k in self.counts})

    def state_dict(self) -> dict[str, Any]:
        tangent = self.copied()
        return {
            "theta": None if tangent is None else tangent.theta,
            "slots": None if tangent is None else tangent.slots,
            **self.average.state_dict(),
            "curvature": self.curvature.state_dict(),
            "hit": self.cap.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        like = self.transition.params[0]

        def here(x: Any) -> Any:
            return None if x is None else x.to(like, copy=True)

        self.tangent = self.pending = None
        self.written.forget()
        if state["theta"] is not None:
            self.tangent = Tangent(here(state["theta"]), {name: here(x) for name, x in state["slots"].items()})
        self.frozen.has_tangents(here(state["theta"]))
        self.average.theta, self.average.tangent = here(state["average"]), here(state["average_tangent"])
        self.curvature.load_state_dict(state["curvature"], like)
        self.cap.load(state["hit"])
