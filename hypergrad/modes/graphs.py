"""Graphs of plain tensor operations, traced from the eager code and compiled: what `compile=True` runs (see compiled.py).

AOTAutograd does not compile a double backward. But a training step and its derivatives are functions of plain tensors,

    step    θ, s, batch ↦ ℓ, g, θ', s'        adjoint    θ, s, g, λ', batch ↦ λ, λ_h        tangent    θ, s, z, batch ↦ θ', s', z'

so the very code of the eager modes (one_step.py) is run once with tracing tensors in the place of the model's parameters and
buffers. What comes out is a graph of plain operations in which both derivatives and the update rule have been carried out; the
compiler fuses and orders it, and leaves out what no result needs.

The numbers of a step (lr, t, …) are arguments, see lifted.py, and so are tensors that the loss reads from elsewhere. Everything
else in Python is as it was when the graph was traced.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from hypergrad.modes.stretch import Stretch
from hypergrad.updates.binding import State, Values
from hypergrad.updates.lifted import MOST, Book, Environment, Lifting

MOST_GRAPHS = 8  # of one kind
REMEDY = "Use compile=False."

Body = Callable[[Stretch, State, list[Tensor]], Any]  # (traced stretch, traced state, further tensors) → nested tensors


@dataclass
class Graph:
    """A compiled function, and what it holds for."""

    run: Callable[..., Any]
    book: Book
    constants: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]  # the body's value from a flat list of tensors
    counted: tuple[int, ...]  # steps that each parameter's counter goes on by
    agreed: int = 0  # times that it gave what the eager code gave
    missed: int = 0
    uses: int = 0
    earlier: bool = False  # it was made in an earlier call


@dataclass
class Kind:
    """The graphs of one kind of call: they differ in the branches that their numbers take."""

    graphs: list[Graph] = field(default_factory=list)
    seen: Counter[Any] = field(default_factory=Counter)

    def find(self, env: Environment) -> Graph | None:
        return next((graph for graph in self.graphs if graph.book.holds(env)), None)

    def is_first(self, env: Environment) -> bool:
        """Whether no call has yet taken the branches that this one takes."""
        outcomes = tuple(graph.book.outcomes(env) for graph in self.graphs)
        self.seen[outcomes] += 1
        return self.seen[outcomes] == 1


Kinds = dict[Any, Kind]


class Graphs:
    """Compiles and runs the steps of one call of `hypergradient`. `kinds`: what there is already."""

    def __init__(self, stretch: Stretch, kinds: Kinds, backend: str):
        self.stretch, self.kinds, self.backend = stretch, kinds, backend
        self.seconds, self.count = 0.0, 0
        self.static = _Hashed((*_static(stretch), backend))

    # ---- arguments of a graph

    def environment(self, state: State, t: int) -> Environment:
        env: dict[Any, float] = {("count", i): float(c) for i, c in enumerate(state.counts)}
        for name, column in self.stretch.values[t].items():
            for group, value in enumerate(column):
                if isinstance(value, tuple):
                    env.update({(name, group, part): x for part, x in enumerate(value)})
                elif value is not None:
                    env[name, group, 0] = value
        return env

    def inputs(self, state: State, leaves: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
        problem = self.stretch.problem
        hypers = [x.detach() for x in problem.hypers.values()]
        return [state.theta, *state.slots.values(), *problem.buffers, *hypers, *leaves, *more]

    def call(
        self, kind: str, state: State, t: int, body: Body, more: Sequence[Tensor], extra_key: Any = None
    ) -> tuple[Any, Graph] | None:
        """The body's value by a graph; None where the eager code is to play this step. Buffers are left alone."""
        leaves, batch_key, spec = _taken_apart(self.stretch.batches[t])
        key = (kind, self.static, self.stretch.problem.stats is None, batch_key, tuple(state.slots), extra_key)
        found, env = self.kinds.setdefault(key, Kind()), self.environment(state, t)
        graph, inputs = found.find(env), self.inputs(state, leaves, more)
        if graph is None:
            if found.is_first(env):
                return None
            if len(found.graphs) == MOST_GRAPHS or len(self.kinds) > 8 * MOST_GRAPHS:
                raise NotImplementedError(
                    f"compile=True: more than {MOST_GRAPHS} graphs of one kind of step. Give batches one shape, and let them "
                    f"hold tensors in place of Python numbers that change from batch to batch. {REMEDY}"
                )
            began = time.perf_counter()
            graph = self._compiled(state, t, body, inputs, len(more), batch_key, spec, env)
            found.graphs.append(graph)
            self.seconds, self.count = self.seconds + time.perf_counter() - began, self.count + 1
        numbers = _numbers(graph.book.evaluate(env), state.theta)
        flat = graph.run(numbers, *inputs, *graph.constants)
        graph.uses += 1
        return graph.rebuild(flat), graph

    # ---- tracing

    def _compiled(
        self,
        state: State,
        t: int,
        body: Body,
        inputs: list[Tensor],
        n_more: int,
        batch_key: Any,
        spec: Any,
        env: Environment,
    ) -> Graph:
        book, notes = Book(), {}
        rng = self.stretch.problem.rng()

        def flat(numbers: Tensor, *xs: Tensor) -> list[Tensor]:
            with self._standing_in(list(xs), state, t, n_more, batch_key, spec, book, env) as (stretch, at, more):
                with Lifting(numbers, book), torch.enable_grad():
                    out = body(stretch, at, more)
            notes["counted"] = out.pop("counted", at.counts) if isinstance(out, dict) else at.counts
            leaves, spec_out = tree_flatten(out)
            notes["rebuild"] = _rebuilding([isinstance(x, Tensor) for x in leaves], spec_out)
            return [x.detach() for x in leaves if isinstance(x, Tensor)]

        try:
            graph = make_fx(flat)(_numbers([0.5] * MOST, state.theta), *inputs)
        except Exception as error:
            cause = error.__cause__ or error  # `Problem` wraps what a loss raises
            raise NotImplementedError(
                f"compile=True: the step cannot be traced ({type(cause).__name__}: {str(cause)[:400]}). A loss must not take decisions on "
                f"the values of tensors (if, .item(), float()). {REMEDY}"
            ) from error
        finally:
            rng.restore()
        constants = _lift_constants(graph, self.stretch)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        counted = tuple(int(float(b) - float(a)) for a, b in zip(state.counts, notes["counted"], strict=True))
        numbers = _numbers(book.evaluate(env), state.theta)
        run = _backend(graph, [numbers, *inputs, *constants], self.backend)
        return Graph(run, book, constants, notes["rebuild"], counted)

    @contextmanager
    def _standing_in(
        self, xs: list[Tensor], state: State, t: int, n_more: int, batch_key: Any, spec: Any, book: Book, env: Environment
    ) -> Iterator[tuple[Stretch, State, list[Tensor]]]:
        """A stretch of one step, number t, whose model holds the given tensors as parameters and buffers."""
        problem, transition = copy.copy(self.stretch.problem), copy.copy(self.stretch.transition)
        take = iter(xs)
        theta = next(take)
        slots = {name: next(take) for name in state.slots}
        buffers = [next(take).clone() for _ in problem.places]
        leaf = lambda x, like: x.detach().requires_grad_(like.requires_grad)  # noqa: E731
        problem.hypers = {name: leaf(next(take), x) for name, x in problem.hypers.items()}
        problem.extra = (problem.hypers,) if problem.extra else ()
        rest = list(take)
        leaves, more = rest[: len(rest) - n_more], rest[len(rest) - n_more :]
        params = [leaf(x, p) for x, p in zip(transition.split(theta), transition.params, strict=True)]
        problem.params = transition.params = params
        transition._plans = {}
        counts = tuple(book.number(float(c), ("count", i)) for i, c in enumerate(state.counts))
        values = _lifted(self.stretch.values[t], book)
        batch = _put_together(leaves, batch_key, spec)
        directions = copy.copy(self.stretch.directions)
        directions.transition, directions.fine = transition, copy.copy(directions.fine)
        directions.fine.transition = transition
        stretch = replace(
            self.stretch,
            problem=problem,
            transition=transition,
            directions=directions,
            batches=_Only(batch),
            values=_Only(values),
        )
        with _in_model(self.stretch, params, buffers):
            yield stretch, State(theta, slots, counts, {}), more  # type: ignore[arg-type]


class _Hashed:
    """A value whose hash is computed once."""

    def __init__(self, value: Any):
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, _Hashed) and self.value == other.value)


def _rebuilding(present: Sequence[bool], spec: Any) -> Callable[[Sequence[Tensor]], Any]:
    """Puts flat tensors where they were in a nested structure; None stays None."""

    def rebuild(flat: Sequence[Tensor]) -> Any:
        take = iter(flat)
        return tree_unflatten([next(take) if there else None for there in present], spec)

    return rebuild


class _Only(list):  # type: ignore[type-arg]
    """The same at every step."""

    def __init__(self, x: Any):
        super().__init__([x])

    def __getitem__(self, t: Any) -> Any:
        return super().__getitem__(0)


@contextmanager
def _in_model(stretch: Stretch, params: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in the place of the model's parameters (tied ones too) and buffers."""
    instead = {id(p): x for p, x in zip(stretch.transition.params, params, strict=True)}
    old = [
        (m._parameters, name, p)
        for m in stretch.problem.model.modules()
        for name, p in m._parameters.items()
        if id(p) in instead
    ]
    kept = [(module._buffers, name, module._buffers[name]) for module, name in stretch.problem.places]
    try:
        for where, name, p in old:
            where[name] = instead[id(p)]  # type: ignore[assignment]
        for (where, name, _), x in zip(kept, buffers, strict=True):
            where[name] = x
        yield
    finally:
        for where, name, x in (*old, *kept):
            where[name] = x  # type: ignore[assignment]


def _lifted(values: Values, book: Book) -> Values:
    def lift(name: str, group: int, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(book.number(x, (name, group, part)) for part, x in enumerate(value))
        return None if value is None else book.number(value, (name, group, 0))

    return {name: [lift(name, group, x) for group, x in enumerate(column)] for name, column in values.items()}


def _numbers(values: list[float], like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(values, dtype=dtype).to(like.device)


def _taken_apart(batch: Any) -> tuple[list[Tensor], Any, Any]:
    """The tensors of a batch; what else is in it, and their shapes; its structure."""
    if type(batch) is tuple and all(type(x) is Tensor for x in batch):
        leaves, spec = list(batch), len(batch)
    else:
        leaves, spec = tree_flatten(batch)
    key = tuple(
        (x.shape, x.dtype, x.device, x.stride(), x.requires_grad) if isinstance(x, Tensor) else (type(x), x) for x in leaves
    )
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(
            f"compile=True: batches must be made of tensors, numbers and strings in tuples, lists and dicts. {REMEDY}"
        ) from error
    return [x for x in leaves if isinstance(x, Tensor)], (key, spec), spec


def _put_together(tensors: Sequence[Tensor], batch_key: Any, spec: Any) -> Any:
    take = iter(tensors)
    leaves = [next(take) if len(entry) > 2 else entry[1] for entry in batch_key[0]]
    return tuple(leaves) if isinstance(spec, int) else tree_unflatten(leaves, spec)


def _static(stretch: Stretch) -> Any:
    """Everything that a graph depends on and that is no tensor, number or batch, as far as it can be seen."""
    problem, transition = stretch.problem, stretch.transition
    return (
        tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in transition.params),
        tuple((b.shape, b.dtype) for b in problem.buffers),
        tuple((name, x.shape) for name, x in problem.hypers.items()),
        tuple(transition.rules),
        tuple(transition.group_of),
        transition.wanted,
        type(transition),
        None if transition.clip is None else transition.clip.name,
        stretch.directions.wrt,
        tuple(stretch.directions.fine.per.items()),
        tuple(m.training for m in problem.model.modules()),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def check_suited(stretch: Stretch, mode: str) -> None:
    transition = stretch.transition
    if mode == "forward" and stretch.directions.fine.per:
        raise NotImplementedError(
            "compile=True with mode='forward' differentiates per group: use mode='unrolled', or compile=False."
        )
    for i in transition.fallbacks:
        raise NotImplementedError(
            f"compile=True: {type(transition.optimizers[i]).__name__} has no update rule here, so that its own step would have to "
            f"be traced. {REMEDY}"
        )
    if transition.clip is not None and transition.clip.name == "clip_norm":
        raise NotImplementedError(
            f"compile=True does not take clip_norm: whether a gradient is clipped is a branch on its value. {REMEDY}"
        )
    if any(getattr(p, "_backward_hooks", None) for p in transition.params):
        raise NotImplementedError(f"compile=True: parameters have hooks, which a graph would leave out. {REMEDY}")


def _lift_constants(graph: Any, stretch: Stretch) -> list[Tensor]:
    """Tensors that the loss reads from elsewhere become arguments, so that a graph sees what they hold at the time."""
    own = {id(p) for p in stretch.transition.params} | {p.data_ptr() for p in stretch.transition.params if p.numel()}
    constants, last = [], [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        x = getattr(graph, node.target)
        if not isinstance(x, Tensor):
            raise NotImplementedError(f"compile=True: the loss runs a part of its own graph ({node.target}). {REMEDY}")
        if id(x) in own or (x.numel() and x.data_ptr() in own):
            raise NotImplementedError(
                "compile=True: the loss reads a parameter of the optimizer in another way than as an attribute of a module of "
                f"`model` (nn.LSTM and nn.GRU keep a list of theirs; or a variable of its own). {REMEDY}"
            )
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
        constants.append(x.detach())
    for node in graph.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            raise NotImplementedError(
                f"compile=True: the loss draws random numbers ({target}), which compiled code does not draw as eager code does. "
                "Set dropout layers to eval() or draw the numbers into the batches. " + REMEDY
            )
    return constants


def _backend(graph: Any, inputs: list[Tensor], name: str) -> Callable[..., Any]:
    if name == "eager":
        return graph
    try:
        with torch.no_grad():
            return torch._inductor.compile(graph, inputs, options={"compile_threads": 1})
    except Exception as error:
        raise NotImplementedError(
            f"compile=True: torch.compile's inductor failed ({type(error).__name__}: {str(error)[:400]}). It needs a C++ "
            f"compiler on CPU (g++ or clang++, or the variable CXX). {REMEDY}"
        ) from error
