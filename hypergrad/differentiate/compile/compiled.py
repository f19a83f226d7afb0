"""`compile=True`: training steps, vjps and jvps by compiled graphs, checked against the eager code.

A graph (graphs.py) holds what Python did when it was traced. Whether that is still right is checked: at its first uses a graph
is run beside the eager code, until they agreed twice, and the loss alone again at its uses 4, 8, 16, …; where they differ an
error is raised. The first step of a kind (of a shape of batches, or with t = 1) is computed by the eager code: it may be the
only one of the trajectory.

The vjp takes the gradient of its step as an argument: what only the gradient needs is then not computed again. Gradients are
kept with the states of a segment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.core.restore import Rng
from hypergrad.differentiate.checkpoints import Checkpoint
from hypergrad.differentiate.compile import traced_functions
from hypergrad.differentiate.compile.agreement import disagreement, refusal
from hypergrad.differentiate.compile.graphs import Graph, Graphs, Kinds
from hypergrad.differentiate.compile.placeholders import check_suited
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.offload import Stacks
from hypergrad.differentiate.one_step import StepVJP, nonzero_tangents, step_jvp, step_vjp
from hypergrad.differentiate.tape import TapePlan
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent

BACKEND = "inductor"
AGREED = 2  # times that a graph must agree with the eager code, before it is used without


# Graphs of earlier calls, for the same optimizer, model and loss. Nothing here keeps one of the three alive.
_EARLIER: weakref.WeakKeyDictionary[torch.optim.Optimizer, Earlier] = weakref.WeakKeyDictionary()


class Earlier(NamedTuple):
    model: Callable[[], Any]
    loss: Callable[[], Any]
    reads: dict[str, Any]
    kinds: Kinds


def compiled(trajectory: Trajectory, mode: str, backend: str | None = None) -> CompiledStepper:
    """The stepper of a trajectory. Graphs of an earlier call are checked again at their first use."""
    check_suited(trajectory, mode)
    optimizer, problem = trajectory.transition.optimizers[0], trajectory.problem
    earlier = _EARLIER.get(optimizer)
    reads = _plain_values(problem.loss)
    same = earlier is not None and earlier.model() is problem.model and earlier.loss() == problem.loss
    if earlier is None or not same or earlier.reads != reads:
        reference = weakref.WeakMethod if hasattr(problem.loss, "__self__") else weakref.ref
        try:
            earlier = Earlier(weakref.ref(problem.model), reference(problem.loss), reads, {})  # type: ignore[arg-type]
        except TypeError:  # it cannot be held weakly
            return CompiledStepper(trajectory, Graphs(trajectory, {}, backend or BACKEND))
        _EARLIER[optimizer] = earlier
    for kind in earlier.kinds.values():
        for graph in kind.graphs:
            graph.agreed, graph.uses, graph.earlier = min(graph.agreed, AGREED - 1), 0, True
    return CompiledStepper(trajectory, Graphs(trajectory, earlier.kinds, backend or BACKEND))


def _plain_values(loss: Any) -> dict[str, Any]:
    """Numbers and strings that the function reads by name: closed over, global, or attributes of its object."""
    function = getattr(loss, "__func__", loss)
    code, owner = getattr(function, "__code__", None), getattr(loss, "__self__", None)
    if code is None:
        return {}
    found = {name: function.__globals__.get(name) for name in code.co_names}
    found |= {f"self.{name}": getattr(owner, "__dict__", {}).get(name) for name in code.co_names}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            found[name] = cell.cell_contents
    return {name: x for name, x in found.items() if isinstance(x, (bool, int, float, str))}


class CompiledStepper:
    """See `Stepper`. The eager code computes steps without a graph; kept of a step is its gradient."""

    def __init__(self, trajectory: Trajectory, graphs: Graphs):
        self.trajectory, self.graphs = trajectory, graphs
        self.gradients: dict[int, Tensor] = {}
        self.without_graph: set[int] = set()  # steps that the eager code computed; it computes them when replayed too
        self.eager = 0
        self.nonzero: list[bool] = []  # whether a direction's tangent of θ has become other than zero

    def stats(self) -> dict[str, Any]:
        return {
            "compile_seconds": self.graphs.seconds,
            "compiled_graphs": self.graphs.count,
            "compiled_steps": self.graphs.calls,
            "eager_steps": self.eager,
        }

    def plan(self, at: Checkpoint, rng: Rng, stacks: Stacks, every: int | None, graph_memory: float) -> TapePlan:
        """A state and a gradient of every step, where they fit; else the gradients of the segment that is replayed."""
        steps, size = len(self.trajectory.batches), at.state.nbytes() + at.state.theta.nbytes
        if every is None and not stacks.offloads and steps * size <= graph_memory:
            every = 1
        if every is None:
            every = stacks.default_every(steps, at.nbytes())
        return TapePlan(every, whole=every == 1 and not stacks.offloads, replayed=every)

    def load(self, state: State) -> None:
        self.trajectory.transition.load(state.theta)

    def restore(self, at: Checkpoint) -> None:
        self.trajectory.restore(at)

    # ---- one training step

    def step(self, state: State, t: int, diagnostics: Diagnostics, keep: bool = False) -> tuple[State, Tensor]:
        diagnostics.gradients += 1
        found = None if t in self.without_graph else self.graphs.call("step", state, t, traced_functions.step, ())
        if found is None:
            self.without_graph.add(t)
            self.eager += 1
            new, loss, g = self._eager_step(state, t)
        else:
            out, graph = found
            if not self._agrees(graph, out, lambda: self._step_beside(state, t)):
                diagnostics.gradients -= 1
                return self.step(state, t, diagnostics, keep)
            new, loss, g = _after(state, out, graph), out["loss"], out["g"]
            self._check_loss(graph, state, t, loss)
            self._write_buffers(out["buffers"])
        diagnostics.observe_conditioning(self.trajectory.ill_conditioned_decay(state, g, t))
        if keep:
            self.gradients[t] = g
        return new, loss

    def _eager_step(self, state: State, t: int) -> tuple[State, Tensor, Tensor]:
        trajectory = self.trajectory
        trajectory.transition.load(state.theta)
        lin = trajectory.problem.linearize(trajectory.batches[t], products=False)
        g = trajectory.gradient(lin)
        return trajectory.transition.step(state, g, lin.active, trajectory.values[t]), lin.loss, g

    def _step_beside(self, state: State, t: int) -> Any:
        """What the graph should have given, by the eager code. Buffers are left as they were."""
        buffers = self.trajectory.problem.read_buffers()
        new, loss, g = self._eager_step(state, t)
        after = [b.detach().clone() for b in self.trajectory.problem.buffers]
        self.trajectory.problem.write_buffers(buffers)
        return {"loss": loss, "g": g, "theta": new.theta, "slots": new.slots, "buffers": after}

    def _write_buffers(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for b, x in zip(self.trajectory.problem.buffers, values, strict=True):
                b.copy_(x)

    # ---- its vjp

    def vjp(self, at: Checkpoint, t: int, lam: Tangent, rng: Rng, diagnostics: Diagnostics) -> StepVJP:
        if t not in self.gradients:
            rng.restore()
            self.trajectory.problem.write_buffers(at.buffers)
            self.step(at.state, t, diagnostics, keep=True)
        rng.restore()
        self.trajectory.problem.write_buffers(at.buffers)
        state, g = at.state, self.gradients.pop(t)
        diagnostics.products += 1
        stats = () if lam.stats is None else (lam.stats,)
        more = [g, lam.theta, *lam.slots.values(), *stats]
        key = (tuple(lam.slots), lam.stats is None)
        function = traced_functions.vjp(lam)
        found = None if t in self.without_graph else self.graphs.call("vjp", state, t, function, more, key)
        if found is None or not self._agrees(found[1], found[0], lambda: self._vjp_beside(state, t, g, lam)):
            self.eager += 1
            return self._eager_vjp(state, t, g, lam)
        out = found[0]
        before = Tangent(out["theta"], out["slots"], out["stats"])
        return StepVJP(before, out["groups"], out["clip"], out["hypers"], out["fine"], out["loss"], out["norm"])

    def _eager_vjp(self, state: State, t: int, g: Tensor, lam: Tangent) -> StepVJP:
        self.trajectory.transition.load(state.theta)
        lin = self.trajectory.problem.linearize(self.trajectory.batches[t])
        return step_vjp(self.trajectory, state, t, lin, lam, g)._replace(loss=lin.loss)

    def _vjp_beside(self, state: State, t: int, g: Tensor, lam: Tangent) -> Any:
        buffers = self.trajectory.problem.read_buffers()
        out = self._eager_vjp(state, t, g, lam)
        self.trajectory.problem.write_buffers(buffers)
        assert out.loss is not None
        return traced_functions.nested_vjp(out, out.loss)

    # ---- its jvp

    def jvp(self, state: State, t: int, tangent: Tangent, diagnostics: Diagnostics) -> tuple[State, Tangent]:
        directions = self.trajectory.directions
        extras = [directions.into_loss(j, t) for j in range(len(directions))]
        self.nonzero = nonzero_tangents(self.trajectory, t, tangent, self.nonzero)
        seeds, clip_seed = directions.seeds(t)
        diagnostics.gradients += 1
        diagnostics.products += sum(a or e is not None for a, e in zip(self.nonzero, extras, strict=True))
        arguments = traced_functions.Arguments(tangent, extras, tuple(self.nonzero), seeds, clip_seed)
        function, key = traced_functions.jvp(arguments), arguments.key()
        found = self.graphs.call("jvp", state, t, function, arguments.tensors(), key)
        if found is None:
            self.eager += 1
            out, new, g = self._eager_jvp(state, t, arguments)
        else:
            out, graph = found
            if not self._agrees(graph, out, lambda: self._jvp_beside(state, t, arguments)):
                out, new, g = self._eager_jvp(state, t, arguments)
                return new, Tangent(out["z"], out["z_slots"], out["z_stats"])
            new, g = _after(state, out, graph), out["g"]
            self._check_loss(graph, state, t, out["loss"])
            self._write_buffers(out["buffers"])
        diagnostics.observe_conditioning(self.trajectory.ill_conditioned_decay(state, g, t))
        return new, Tangent(out["z"], out["z_slots"], out["z_stats"])

    def _eager_jvp(self, state: State, t: int, arguments: traced_functions.Arguments) -> tuple[Any, State, Tensor]:
        self.trajectory.transition.load(state.theta)
        lin = self.trajectory.problem.linearize(self.trajectory.batches[t])
        out = step_jvp(self.trajectory, state, t, lin, *arguments)
        return traced_functions.nested_jvp(out, lin.loss), out.state, out.g

    def _jvp_beside(self, state: State, t: int, arguments: traced_functions.Arguments) -> Any:
        buffers = self.trajectory.problem.read_buffers()
        out, _, _ = self._eager_jvp(state, t, arguments)
        out["buffers"] = [b.detach().clone() for b in self.trajectory.problem.buffers]
        self.trajectory.problem.write_buffers(buffers)
        return out

    # ---- checks of graphs against the eager code

    def _agrees(self, graph: Graph, found: Any, eager: Callable[[], Any]) -> bool:
        """Whether a graph may be used here. False: it is of an earlier call and no longer right; all are made again."""
        if graph.agreed >= AGREED:
            return True
        truth = eager()
        off = disagreement({name: found[name] for name in truth}, truth)
        if off == 0:
            graph.agreed += 1
            return True
        if graph.earlier:
            self.graphs.kinds.clear()
            return False
        graph.missed += 1
        graph.agreed = 0
        if off > 1 or graph.missed == AGREED:
            raise refusal("its results differ from those of the eager code")
        return True

    def _check_loss(self, graph: Graph, state: State, t: int, loss: Tensor) -> None:
        """The loss alone against the eager code, at uses 4, 8, 16, …"""
        if graph.uses < 4 or graph.uses & (graph.uses - 1):
            return
        problem = self.trajectory.problem
        buffers, rng = problem.read_buffers(), problem.rng()
        self.trajectory.transition.load(state.theta)
        with torch.no_grad():
            truth = problem.loss(problem.model, self.trajectory.batches[t], *problem.extra)  # type: ignore[misc]
        problem.write_buffers(buffers)
        rng.restore()
        if disagreement({"loss": [loss]}, {"loss": [truth.detach()]}):
            raise refusal(f"the loss of step {t} is {float(loss):.9g} by it and {float(truth):.9g} by the eager code")


def _after(state: State, out: Any, graph: Graph) -> State:
    counts = tuple(c + more for c, more in zip(state.counts, graph.counted, strict=True))
    return State(out["theta"], out["slots"], counts)
