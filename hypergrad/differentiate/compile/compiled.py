"""`compile=True`: training steps, adjoints and tangents by compiled graphs, looked at against the eager code.

A graph (graphs.py) holds what Python did when it was traced. Whether that is still right is looked at: a graph is run beside
the eager code at its first uses, until they agreed twice, and the loss alone again at its uses 4, 8, 16, …; where they differ
an error is raised. The first step of a kind (of a shape of batches, or with t = 1) is played by the eager code: it may be the
only one of the trajectory.

The adjoint takes the gradient of its step as an argument: with it in hand, what only the gradient needs is not computed again. It
is kept beside the states of a segment.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hypergrad.differentiate.compile import traced_functions as bodies
from hypergrad.differentiate.compile.graphs import Graph, Graphs, Kinds
from hypergrad.differentiate.compile.placeholders import REMEDY, check_suited
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.one_step import StepVJP, step_jvp, step_vjp
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent

BACKEND = "inductor"
AGREED = 2  # times, before a graph is taken at its word
# relative difference from the eager code beyond which a graph is refused
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 5e-2  # of other dtypes
SINGLE = 30  # times that for single numbers, which may be small differences of large ones


class Played(NamedTuple):
    """What is kept of a step."""

    loss: Tensor
    g: Tensor


# Graphs of earlier calls, for the same optimizer, model and loss. Nothing here keeps one of the three alive.
_EARLIER: weakref.WeakKeyDictionary[torch.optim.Optimizer, Earlier] = weakref.WeakKeyDictionary()


class Earlier(NamedTuple):
    model: Callable[[], Any]
    loss: Callable[[], Any]
    reads: dict[str, Any]
    kinds: Kinds


def compiled(trajectory: Trajectory, mode: str, backend: str | None = None) -> Compiled:
    """What plays the steps of a trajectory. Graphs of an earlier call are looked at anew at their first use."""
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
            return Compiled(trajectory, Graphs(trajectory, {}, backend or BACKEND))
        _EARLIER[optimizer] = earlier
    for kind in earlier.kinds.values():
        for graph in kind.graphs:
            graph.agreed, graph.uses, graph.earlier = min(graph.agreed, AGREED - 1), 0, True
    return Compiled(trajectory, Graphs(trajectory, earlier.kinds, backend or BACKEND))


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


class Compiled:
    """The steps of one call of `hypergradient`."""

    def __init__(self, trajectory: Trajectory, graphs: Graphs):
        self.trajectory, self.graphs = trajectory, graphs
        self.by_hand: set[int] = set()  # steps that the eager code played; it plays them again
        self.eager = 0
        self.alive: list[bool] = []

    def stats(self) -> dict[str, Any]:
        return {
            "compile_seconds": self.graphs.seconds,
            "compiled_graphs": self.graphs.count,
            "compiled_steps": self.graphs.calls,
            "eager_steps": self.eager,
        }

    # ---- one training step

    def step(self, state: State, t: int, diagnostics: Diagnostics) -> tuple[State, Played]:
        """The state after step t; buffers of the model are those before it, and after it on return."""
        diagnostics.gradients += 1
        found = None if t in self.by_hand else self.graphs.call("step", state, t, bodies.step, ())
        if found is None:
            self.by_hand.add(t)
            self.eager += 1
            new, played = self._eager_step(state, t)
        else:
            out, graph = found
            if not self._look(graph, out, lambda: self._step_again(state, t)):
                diagnostics.gradients -= 1
                return self.step(state, t, diagnostics)
            new = _after(state, out, graph)
            played = Played(out["loss"], out["g"])
            self._look_at_loss(graph, state, t, played.loss)
            self._write_buffers(out["buffers"])
        diagnostics.look_for_ill_conditioning(self.trajectory, state, played.g, t)
        return new, played

    def _eager_step(self, state: State, t: int) -> tuple[State, Played]:
        trajectory = self.trajectory
        trajectory.transition.load(state.theta)
        lin = trajectory.problem.linearize(trajectory.batches[t], products=False)
        g = trajectory.gradient(lin)
        return trajectory.transition.step(state, g, lin.active, trajectory.values[t]), Played(lin.loss, g)

    def _step_again(self, state: State, t: int) -> Any:
        buffers = self.trajectory.problem.read_buffers()
        new, played = self._eager_step(state, t)
        after = [b.detach().clone() for b in self.trajectory.problem.buffers]
        self.trajectory.problem.write_buffers(buffers)
        return {"loss": played.loss, "g": played.g, "theta": new.theta, "slots": new.slots, "buffers": after}

    def _write_buffers(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for b, x in zip(self.trajectory.problem.buffers, values, strict=True):
                b.copy_(x)

    # ---- its adjoint

    def pull(
        self, state: State, t: int, g: Tensor, lam: Tangent, diagnostics: Diagnostics
    ) -> tuple[StepVJP, Tensor, Tensor | None]:
        """The adjoint before step t, its norm where known, and the loss; buffers are those before the step."""
        diagnostics.products += 1
        stats = () if lam.stats is None else (lam.stats,)
        more = [g, lam.theta, *lam.slots.values(), *stats]
        key = (tuple(lam.slots), lam.stats is None)
        found = None if t in self.by_hand else self.graphs.call("adjoint", state, t, bodies.adjoint(lam), more, key)
        if found is None or not self._look(found[1], found[0], lambda: self._pull_again(state, t, g, lam)):
            self.eager += 1
            pull, loss = self._eager_pull(state, t, g, lam)
            return pull, loss, None
        out = found[0]
        before = Tangent(out["theta"], out["slots"], out["stats"])
        return StepVJP(before, out["groups"], out["clip"], out["hypers"], out["fine"]), out["loss"], out["norm"]

    def _eager_pull(self, state: State, t: int, g: Tensor, lam: Tangent) -> tuple[StepVJP, Tensor]:
        self.trajectory.transition.load(state.theta)
        lin = self.trajectory.problem.linearize(self.trajectory.batches[t])
        return step_vjp(self.trajectory, state, t, lin, lam, g), lin.loss

    def _pull_again(self, state: State, t: int, g: Tensor, lam: Tangent) -> Any:
        buffers = self.trajectory.problem.read_buffers()
        pull, loss = self._eager_pull(state, t, g, lam)
        self.trajectory.problem.write_buffers(buffers)
        return bodies.of_pull(pull, loss)

    # ---- its tangents

    def push(self, state: State, t: int, tangent: Tangent, diagnostics: Diagnostics) -> tuple[State, Tangent]:
        """State and tangents after step t; buffers as with `step`."""
        directions = self.trajectory.directions
        extras = [directions.into_loss(j, t) for j in range(len(directions))]
        if not all(self.alive):
            self.alive = (tangent.theta != 0).any(dim=1).tolist()
        elif not self.alive:
            self.alive = [False] * len(directions)
        seeds, clip_seed = directions.seeds(t)
        diagnostics.gradients += 1
        diagnostics.products += sum(a or e is not None for a, e in zip(self.alive, extras, strict=True))
        arguments = bodies.Arguments(tangent, extras, tuple(self.alive), seeds, clip_seed)
        key = arguments.key()
        found = self.graphs.call("tangent", state, t, bodies.tangent(arguments), arguments.tensors(), key)
        if found is None:
            self.eager += 1
            out, new, g = self._eager_push(state, t, arguments)
        else:
            out, graph = found
            if not self._look(graph, out, lambda: self._push_again(state, t, arguments)):
                out, new, g = self._eager_push(state, t, arguments)
                return new, Tangent(out["z"], out["z_slots"], out["z_stats"])
            new, g = _after(state, out, graph), out["g"]
            self._look_at_loss(graph, state, t, out["loss"])
            self._write_buffers(out["buffers"])
        diagnostics.look_for_ill_conditioning(self.trajectory, state, g, t)
        return new, Tangent(out["z"], out["z_slots"], out["z_stats"])

    def _eager_push(self, state: State, t: int, arguments: bodies.Arguments) -> tuple[Any, State, Tensor]:
        self.trajectory.transition.load(state.theta)
        lin = self.trajectory.problem.linearize(self.trajectory.batches[t])
        push = step_jvp(self.trajectory, state, t, lin, *arguments)
        return bodies.of_push(push, lin.loss), push.state, push.g

    def _push_again(self, state: State, t: int, arguments: bodies.Arguments) -> Any:
        buffers = self.trajectory.problem.read_buffers()
        out, _, _ = self._eager_push(state, t, arguments)
        out["buffers"] = [b.detach().clone() for b in self.trajectory.problem.buffers]
        self.trajectory.problem.write_buffers(buffers)
        return out

    # ---- looking at graphs against the eager code

    def _look(self, graph: Graph, found: Any, again: Any) -> bool:
        """Whether a graph may be used here. False: it was, in an earlier call; all graphs are made anew."""
        if graph.agreed >= AGREED:
            return True
        truth = again()
        off = _furthest({name: found[name] for name in truth}, truth)
        if off == 0:
            graph.agreed += 1
            return True
        if graph.earlier:
            self.graphs.kinds.clear()
            return False
        graph.missed += 1
        graph.agreed = 0
        if off > 1 or graph.missed == AGREED:
            raise _refusal("its results differ from those of the eager code")
        return True

    def _look_at_loss(self, graph: Graph, state: State, t: int, loss: Tensor) -> None:
        if graph.uses < 4 or graph.uses & (graph.uses - 1):
            return
        problem = self.trajectory.problem
        buffers, rng = problem.read_buffers(), problem.rng()
        self.trajectory.transition.load(state.theta)
        with torch.no_grad():
            truth = problem.loss(problem.model, self.trajectory.batches[t], *problem.extra)  # type: ignore[misc]
        problem.write_buffers(buffers)
        rng.restore()
        if _furthest({"loss": [loss]}, {"loss": [truth.detach()]}):
            raise _refusal(f"the loss of step {t} is {float(loss):.9g} by it and {float(truth):.9g} by the eager code")


def _refusal(what: str) -> ValueError:
    return ValueError(
        f"compile=True: a compiled step is not what the loss computes: {what}. A graph holds what Python did when it was traced; "
        "the loss may depend on something in Python that changes from step to step (a counter, a list, a number). Put it into "
        f"the batches, as tensors. {REMEDY}"
    )


def _furthest(found: Any, truth: Any) -> float:
    """0 where all agrees; 1 where single numbers alone are off, which may be by chance; 2 where vectors are."""
    worst = 0.0
    for a, b in zip(tree_leaves(found), tree_leaves(truth), strict=True):
        if a is None or b is None:
            if a is not b:
                return 2.0
            continue
        if a.shape != b.shape:
            return 2.0
        if not b.is_floating_point():
            worst = worst if torch.equal(a, b) else 2.0
            continue
        single, tolerance = b.numel() == 1, TOLERANCE.get(b.dtype, COARSE)
        a, b = a.double(), b.double()
        size, difference = float(torch.linalg.vector_norm(b)), float(torch.linalg.vector_norm(a - b))
        if math.isnan(difference):
            worst = worst if torch.equal(a.isfinite(), b.isfinite()) else 2.0
        elif difference > (SINGLE if single else 1) * tolerance * size:
            worst = max(worst, 1.0 if single else 2.0)
    return worst


def _after(state: State, out: Any, graph: Graph) -> State:
    counts = tuple(c + more for c, more in zip(state.counts, graph.counted, strict=True))
    return State(out["theta"], out["slots"], counts)
