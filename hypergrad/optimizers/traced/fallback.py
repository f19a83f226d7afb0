"""An optimizer without an update rule here: its own unmodified step, replayed and differentiated.

One `Fallback` is one live optimizer. Its parameters are one range of θ; its tensors and floats are slots of the state, each a
vector of its own, and what is neither is the `rest` (see memory.py). It is right rather than fast: a derivative runs the
optimizer's Python once a step, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad.core.float64 import has_float64
from hypergrad.core.signatures import positional
from hypergrad.optimizers.group_values import floats
from hypergrad.optimizers.registry import unhooked_step
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.span import Span
from hypergrad.optimizers.traced.memory import Memory, flat, placeholders_of, shaped, split, write_back
from hypergrad.optimizers.traced.own_step import Inputs, Key, Outcome, own_step, trace
from hypergrad.optimizers.traced.self_check import hyperparameters_of


def _check_no_closure(optimizer: torch.optim.Optimizer) -> None:
    taken = positional(unhooked_step(type(optimizer)))
    if taken is not None and any(p.name == "closure" for p in taken.required):
        raise NotImplementedError(
            f"{type(optimizer).__name__} has no update rule here, and calls a closure within its step, for losses and gradients "
            "at other weights than those of the step: that is not differentiated. Use an optimizer whose step() needs no "
            "closure, such as torch.optim.SGD or AdamW."
        )


def _check_float64(optimizer: torch.optim.Optimizer) -> None:
    device = optimizer.param_groups[0]["params"][0].device
    if not has_float64(device):
        raise NotImplementedError(
            f"{type(optimizer).__name__} has no update rule here, and its own step is traced in float64, which device "
            f"{device.type!r} does not have. Use an optimizer with a rule (docs/optimizers.md), such as "
            "torch.optim.AdamW, or train on the CPU."
        )


@dataclass(frozen=True)
class OwnStep:
    """In place of a rule, for a group whose optimizer has none."""

    hyperparameters: tuple[str, ...]
    maximize: bool = False

    slots: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False
    second_moment_of_decay: ClassVar[str | None] = None
    decoupled: ClassVar[bool] = True  # as far as is known: its fixed point need not be a minimum


class Fallback:
    """One live optimizer that takes its own step.

    Args:
        number: its number among the optimizers of a transition.
        group: the number of its first param group there.
        start: where its parameters begin in θ.
        param: the number of its first parameter.
        tuned: names to differentiate in, of any optimizer.

    Raises:
        NotImplementedError: its step cannot be differentiated, or a derivative is lost (see self_check.py).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, number: int, group: int, start: int, param: int, tuned: frozenset[str]
    ):
        self.optimizer, self.number, self.group, self.param = optimizer, number, group, param
        mine = {name for group in optimizer.param_groups for name in group}
        self.tuned = frozenset(tuned & mine)
        _check_no_closure(optimizer)
        _check_float64(optimizer)
        if "initial_accumulator_value" in self.tuned:  # no step reads it: its derivative would be 0
            raise NotImplementedError(
                f"{type(optimizer).__name__} has no update rule here, and its `initial_accumulator_value` acts in the "
                "constructor, not in a step: leave it out."
            )
        self.names = hyperparameters_of(optimizer, self.tuned)
        self.params = [p for g in optimizer.param_groups for p in g["params"]]
        self.sizes = [p.numel() for p in self.params]
        n = sum(self.sizes)
        self.span = Span(start, start + n, (n,))  # in θ
        self.prefix = f"optimizer[{number}]."

    def rules(self) -> list[OwnStep]:
        """In place of rules, one for each of its groups."""
        names = tuple(part for name in sorted(self.names) for part in parts(name))
        maximize = getattr(self.optimizer, "maximize", False)
        return [OwnStep(names, bool(group.get("maximize", maximize))) for group in self.optimizer.param_groups]

    # ---- the live optimizer

    def read(self) -> tuple[Tensors, Any]:
        return self._flat(split(self.optimizer, self.names))

    def write(self, slots: Mapping[str, Tensor], rest: Any) -> None:
        with torch.no_grad():
            write_back(self.optimizer, self._memory(slots, rest), self.names)

    def _flat(self, memory: Memory) -> tuple[Tensors, Any]:
        return {self.prefix + name: flat(x, self.params[0]) for name, x in memory.reals.items()}, memory.rest

    def _memory(self, slots: Mapping[str, Tensor], rest: Any) -> Memory:
        return Memory(
            {name: shaped(old, slots[self.prefix + name]) for name, old in placeholders_of(rest).items()}, rest
        )

    # ---- one step

    def inputs(
        self,
        theta: Tensor,
        g: Tensor,
        active: Sequence[bool],
        slots: Mapping[str, Tensor],
        rest: Any,
        values: Mapping[str, Sequence[Any]],
    ) -> Inputs:
        """What a step from this state is a function of."""
        grads = zip(self._split(g), active[self.param :], strict=False)
        here = {
            (i, name): values[name][self.group + i] if name in values else floats(group[name])
            for i, group in enumerate(self.optimizer.param_groups)
            for name in self.names & group.keys()
        }
        return Inputs(
            type(self.optimizer),
            self.params,
            self._split(theta),
            [x if a else None for x, a in grads],
            self._memory(slots, rest),
            here,
            self.names,
        )

    def _split(self, x: Tensor) -> list[Tensor]:
        """The parameters' pieces of a vector [n], or of rows [k, n]."""
        pieces = self.span.of(x).split(self.sizes, dim=-1)
        return [y.reshape(*x.shape[:-1], *p.shape) for y, p in zip(pieces, self.params, strict=True)]

    def step(self, inputs: Inputs) -> tuple[Tensor, Tensors, Any]:
        """θ', slots' and rest' of one step."""
        if not any(g is not None for g in inputs.grads):  # another optimizer takes this step
            return torch.cat([p.reshape(-1) for p in inputs.params]), *self._flat(inputs.memory)
        outcome = self._checked(own_step(inputs))
        return torch.cat([p.reshape(-1) for p in outcome.params]), *self._flat(outcome.memory)

    def _checked(self, outcome: Outcome) -> Outcome:
        """Raise where a step wrote to a name that no step of the self-check wrote to: a replay would use the old value."""
        for name in sorted(outcome.written & self.names):
            raise NotImplementedError(
                f"{type(self.optimizer).__name__} wrote to its hyperparameter `{name}` in a step: hypergrad took it "
                "for a constant."
            )
        return outcome

    def jvp(
        self, inputs: Inputs, dtheta: Tensor, dg: Tensor, dslots: Tensors, seeds: Sequence[Tensors]
    ) -> tuple[Tensor, Tensors]:
        """Tangents [k, …] of θ' and of slots'."""
        k, mine = len(dtheta), {key: x for key, x in dslots.items() if key.startswith(self.prefix)}
        if not any(g is not None for g in inputs.grads):
            return self.span.of(dtheta), mine
        tangents: dict[Key, Tensor] = {("param", i): x for i, x in enumerate(self._split(dtheta))}
        tangents |= {("grad", i): x for i, x in enumerate(self._split(dg))}
        tangents |= {("real", key.removeprefix(self.prefix)): x for key, x in mine.items()}
        for group, name, j, part in self._parts():
            if part in seeds[self.group + group]:
                tangents["value", group, name, j] = seeds[self.group + group][part]
        traced, outcome = trace(inputs, self.tuned)
        self._checked(outcome)
        # a tensor that was replaced from outside by one of another size has the tangent 0
        sizes = {key: x.numel() for key, x in traced.inputs.items()}
        out = traced.jvp(k, {key: x for key, x in tangents.items() if x[0].numel() == sizes.get(key)})
        for i, g in enumerate(inputs.grads):
            if g is None:
                out["param", i] = tangents["param", i]
        theta = torch.cat([out["param", i].reshape(k, -1) for i in range(len(self.params))], dim=-1)
        return theta, {self.prefix + key[1]: x.reshape(k, -1) for key, x in out.items() if key[0] == "real"}

    def vjp(
        self, inputs: Inputs, ltheta: Tensor, lslots: Tensors, lam_h: list[Tensors]
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Adjoints of θ, g and slots; those of hyperparameters are written into `lam_h`, group by group."""
        mine = {key.removeprefix(self.prefix): x for key, x in lslots.items() if key.startswith(self.prefix)}
        if not any(g is not None for g in inputs.grads):
            return self.span.of(ltheta), torch.zeros_like(self.span.of(ltheta)), self._named(mine)
        traced, outcome = trace(inputs, self.tuned)
        self._checked(outcome)
        cotangents: dict[Key, Tensor] = {("param", i): x for i, x in enumerate(self._split(ltheta))}
        out = traced.vjp(cotangents | {("real", name): x for name, x in mine.items()})
        for group, name, j, part in self._parts():
            if ("value", group, name, j) in out:
                lam_h[self.group + group][part] = out["value", group, name, j]
        lp, lg = [], []
        for i, (p, g) in enumerate(zip(self.params, inputs.grads, strict=True)):
            none = ltheta.new_zeros(p.shape)
            lp.append(cotangents["param", i] if g is None else out.get(("param", i), none))
            lg.append(out.get(("grad", i), none))
        reals = {key[1]: x.detach() for key, x in traced.inputs.items() if key[0] == "real"}
        ls = {name: out.get(("real", name), torch.zeros_like(x)).reshape(-1) for name, x in reals.items()}
        return torch.cat([x.reshape(-1) for x in lp]), torch.cat([x.reshape(-1) for x in lg]), self._named(ls)

    def _named(self, reals: Tensors) -> Tensors:
        return {self.prefix + name: x for name, x in reals.items()}

    def _parts(self) -> list[tuple[int, str, int, str]]:
        """(group, name, number of the part, the rule's name of it) of all that is tuned."""
        groups = range(len(self.optimizer.param_groups))
        return [(g, name, j, part) for g in groups for name in self.tuned for j, part in enumerate(parts(name))]
