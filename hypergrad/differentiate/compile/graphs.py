"""Graphs of plain tensor operations, traced from the eager code and compiled: what `compile=True` runs (see compiled.py).

AOTAutograd does not compile a double backward. But a training step and its derivatives are functions of plain tensors,

    step    θ, s, batch ↦ ℓ, g, θ', s'        vjp    θ, s, g, λ', batch ↦ λ, λ_h        jvp    θ, s, z, batch ↦ θ', s', z'

so the same code as in eager mode (one_step.py) is run once with tracing tensors in place of the model's parameters and buffers.
The result is a graph of plain operations in which both derivatives and the update rule have been carried out; the compiler
fuses and orders them, and leaves out what no result needs.

The numbers of a step (lr, t, …) are arguments, see symbolic_floats.py, and so are tensors that the loss reads from elsewhere.
Everything else in Python is as it was when the graph was traced.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hypergrad.differentiate.compile.placeholders import REMEDY, Batch, arguments, environment, placeholders, static_key
from hypergrad.differentiate.compile.symbolic_floats import MOST, Environment, Registry, SymbolicMode
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State

MOST_GRAPHS, MOST_KINDS = 8, 64  # of steps, of vjps or of jvps; a kind that came only once has no graph
# Of inductor: compile in this process; on CPU without the pattern that makes an addmm of mm and add, which copies the summand.
OPTIONS = {"cpu": {"compile_threads": 1, "pattern_matcher": False}, "cuda": {"compile_threads": 1}}

# (trajectory, state, further tensors) → nested tensors
TracedFunction = Callable[[Trajectory, State, list[Tensor]], dict[str, Any]]


@dataclass
class Graph:
    """A compiled function, and when it may be used."""

    run: Callable[..., Any]
    registry: Registry  # of the numbers it takes
    constants: list[Tensor]  # that the loss reads from elsewhere
    like: Any  # the structure of the traced function's value
    counted: tuple[int, ...]  # by how much each parameter's step counter rises
    agreed: int = 0  # times that it gave what the eager code gave
    missed: int = 0
    uses: int = 0
    earlier: bool = False  # it was made in an earlier call


@dataclass
class Kind:
    """The graphs of one kind of call: they differ in the branches that numbers take."""

    graphs: list[Graph] = field(default_factory=list)

    def find(self, env: Environment) -> Graph | None:
        return next((graph for graph in self.graphs if graph.registry.holds(env)), None)

    def takes_alike(self, a: Environment, b: Environment) -> bool:
        """Whether two calls take the same branches, as far as they are known."""
        return all(graph.registry.outcomes(a) == graph.registry.outcomes(b) for graph in self.graphs)


Kinds = dict[Any, Kind]


class Graphs:
    """Makes and calls the graphs of one call of `hypergradient`. `kinds`: what there is already."""

    def __init__(self, trajectory: Trajectory, kinds: Kinds, backend: str):
        self.trajectory, self.kinds, self.backend = trajectory, kinds, backend
        self.once: dict[Any, list[Environment]] = {}  # numbers of the steps of each kind that the eager code computed
        self.seconds, self.count, self.calls = 0.0, 0, 0
        self.static = _Hashed((*static_key(trajectory), backend))

    def call(
        self, kind: str, state: State, t: int, traced: TracedFunction, more: Sequence[Tensor], detail: Any = None
    ) -> tuple[dict[str, Any], Graph] | None:
        """The traced function's value by a graph; None where the eager code is to compute this step.

        Args:
            kind, detail: what the function depends on besides its arguments.
            more: further tensors for the function.
        """
        batch = Batch.of(self.trajectory.batches[t])
        key = (kind, self.static, self.trajectory.problem.stats is None, batch.key, tuple(state.slots), detail)
        found, env = self.kinds.setdefault(key, Kind()), environment(state, self.trajectory.values[t])
        graph, tensors = found.find(env), arguments(self.trajectory, state, batch, more)
        if graph is None:
            alike = [other for k, other in self.kinds.items() if k[0] == kind]
            if sum(len(other.graphs) for other in alike) >= MOST_GRAPHS or len(alike) > MOST_KINDS:
                raise NotImplementedError(
                    f"compile=True: more than {MOST_GRAPHS} graphs of one kind of step. Give batches one shape, and let them "
                    f"hold tensors in place of Python numbers that change from batch to batch. {REMEDY}"
                )
            seen = self.once.setdefault(key, [])
            if not any(found.takes_alike(env, old) for old in seen):
                seen.append(env)
                return None
            began = time.perf_counter()
            graph = self._made(state, t, traced, batch, tensors, env)
            found.graphs.append(graph)
            self.seconds, self.count = self.seconds + time.perf_counter() - began, self.count + 1
        graph.uses, self.calls = graph.uses + 1, self.calls + 1
        numbers = _vector(graph.registry.evaluate(env), state.theta)
        return _rebuilt(graph.like, iter(graph.run(numbers, *tensors, *graph.constants))), graph

    def _made(
        self, state: State, t: int, traced: TracedFunction, batch: Batch, tensors: list[Tensor], env: Environment
    ) -> Graph:
        registry, rng = Registry(), self.trajectory.problem.rng()
        notes: dict[str, Any] = {}

        def flat(numbers: Tensor, *xs: Tensor) -> list[Tensor]:
            with (
                placeholders(self.trajectory, state, t, batch, xs, registry) as (trajectory, at, more),
                SymbolicMode(numbers, registry),
            ):
                out = traced(trajectory, at, more)
            notes["counts"] = out.pop("counts", at.counts)
            notes["like"] = out
            return [x.detach() for x in _leaves(out)]

        try:
            with torch.enable_grad():
                graph = make_fx(flat)(_vector([0.5] * MOST, state.theta), *tensors)
        except Exception as error:
            cause = error.__cause__ or error  # `Problem` wraps what a loss raises
            raise NotImplementedError(
                f"compile=True: the step cannot be traced ({type(cause).__name__}: {str(cause)[:400]}). A loss must not take "
                f"decisions on the values of tensors (if, .item(), float()). {REMEDY}"
            ) from error
        finally:
            rng.restore()
        constants = _constants_as_inputs(graph, self.trajectory)
        _check_randomness(graph)
        counted = tuple(int(float(b) - float(a)) for a, b in zip(state.counts, notes["counts"], strict=True))
        like = _rebuilt(notes["like"], itertools.repeat(...))
        numbers = _vector(registry.evaluate(env), state.theta)
        run = _compiled(graph, [numbers, *tensors, *constants], self.backend)
        return Graph(run, registry, constants, like, counted)


class _Hashed:
    """A value whose hash is computed once."""

    def __init__(self, value: Any):
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, _Hashed) and self.value == other.value)


def _vector(values: list[float], like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(values, dtype=dtype, device=like.device)


def _leaves(x: Any) -> list[Tensor]:
    """The tensors in nested dicts and lists; None is none."""
    if isinstance(x, Tensor):
        return [x]
    return [] if x is None else [leaf for y in (x.values() if isinstance(x, dict) else x) for leaf in _leaves(y)]


def _rebuilt(like: Any, take: Iterator[Any]) -> Any:
    """The same structure with what comes next in the place of each tensor."""
    if like is None:
        return None
    if isinstance(like, dict):
        return {name: _rebuilt(y, take) for name, y in like.items()}
    return [_rebuilt(y, take) for y in like] if isinstance(like, list) else next(take)


def _constants_as_inputs(traced: Any, trajectory: Trajectory) -> list[Tensor]:
    """Make inputs of the tensors that the loss reads from elsewhere, so that each call reads their present values."""
    params = trajectory.transition.params
    own = {p.untyped_storage().data_ptr() for p in params if p.numel()}
    constants: list[Tensor] = []
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        x = getattr(traced, node.target)
        if not isinstance(x, Tensor):
            raise NotImplementedError(
                f"compile=True: the loss contains a traced graph of its own ({node.target}). {REMEDY}"
            )
        if x.numel() and x.untyped_storage().data_ptr() in own:
            raise NotImplementedError(
                "compile=True: the loss reads a parameter of the optimizer in another way than as an attribute of a module of "
                f"`model` (nn.LSTM and nn.GRU keep a list of theirs; or a variable of its own). {REMEDY}"
            )
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(last)
        traced.graph.erase_node(node)
        constants.append(x.detach())
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return constants


def _check_randomness(traced: Any) -> None:
    for node in traced.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise NotImplementedError(
                f"compile=True: the loss draws random numbers ({node.target}), which compiled code does not draw as eager code "
                f"does. Put dropout layers into eval(), or draw the numbers into the batches. {REMEDY}"
            )


def _split_addmm(traced: Any) -> None:
    """b + A B in two, so that the sum becomes part of what follows it."""
    aten = torch.ops.aten
    for node in traced.graph.find_nodes(op="call_function", target=aten.addmm.default):
        if node.kwargs:
            continue
        with traced.graph.inserting_before(node):
            product = traced.graph.call_function(aten.mm.default, node.args[1:])
            node.replace_all_uses_with(traced.graph.call_function(aten.add.Tensor, (node.args[0], product)))
        traced.graph.erase_node(node)
    traced.recompile()


def _compiled(traced: Any, inputs: list[Tensor], backend: str) -> Callable[..., Any]:
    if backend == "eager":
        return traced
    device = inputs[0].device.type
    if device == "cpu":
        _split_addmm(traced)
    try:
        with torch.no_grad():
            run: Any = torch._inductor.compile(traced, [*inputs], options=OPTIONS.get(device))
            return run
    except Exception as error:
        raise NotImplementedError(
            f"compile=True: inductor failed ({type(error).__name__}: {str(error)[:400]}). On CPU it needs a C++ compiler (g++ or "
            f"clang++ on the path, or the variable CXX). {REMEDY}"
        ) from error
