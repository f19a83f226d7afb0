"""A live `torch.optim` optimizer (or several) as a pure function of flat tensors.

All parameters are joined into one vector θ of length n, and so is each of the optimizer's tensors (a *slot*). A step
applies each group's rule to the ranges of that vector that share hyperparameters and step number; parameters without
a gradient are passed over, as `torch.optim` does. Tangents are [k, n], adjoints [n].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypergrad.updates import rule_of
from hypergrad.updates.clip import Clip, ClipNorm, ClipValue
from hypergrad.updates.rule import Tensors, UpdateRule

# names in param_groups whose value is several numbers: name -> the rule's names of them
PARTS = {"betas": ("beta1", "beta2")}
CLIPS: dict[str, type[Clip]] = {"clip_norm": ClipNorm, "clip_value": ClipValue}

WELL_CONDITIONED_EPS = 1e-3  # from here on d/d(weight decay) through g/(√v + eps) at g = v = 0 is of ordinary size

# values[name][group] is a number, a tuple of numbers (betas) or None (the group has no such name); a clip's
# threshold is values["clip_norm"][0].
Values = dict[str, list[Any]]


def parts(name: str) -> tuple[str, ...]:
    return PARTS.get(name, (name,))


@dataclass
class State:
    """θ, slots and the number of steps each parameter has taken. Never changed in place."""

    theta: Tensor
    slots: Tensors
    counts: tuple[int, ...]

    def equals(self, other: State) -> bool:
        """Bit for bit."""
        same = self.counts == other.counts and self.slots.keys() == other.slots.keys()
        pairs = [(self.theta, other.theta), *((x, other.slots[name]) for name, x in self.slots.items())] if same else []
        return same and all(torch.equal(a, b) for a, b in pairs)

    def like(self, theta: Tensor, slots: Tensors, active: Sequence[bool]) -> State:
        return State(theta, slots, tuple(c + a for c, a in zip(self.counts, active, strict=True)))


@dataclass
class Tangent:
    """Tangents (or, with vectors in place of matrices, adjoints) of θ, of the slots and of running statistics."""

    theta: Tensor
    slots: Tensors
    stats: Tensor | None = None

    @staticmethod
    def zeros(state: State, k: int | None = None) -> Tangent:
        def zero(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if k is None else x.new_zeros(k, x.numel())

        return Tangent(zero(state.theta), {name: zero(x) for name, x in state.slots.items()})


@dataclass(frozen=True)
class Run:
    """A range of θ in which one rule acts with one set of numbers."""

    group: int
    start: int
    stop: int
    t: int

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.stop]


@dataclass
class _Pieces:
    """Puts ranges together again; what no range covers keeps its old value."""

    old: Tensor
    new: list[tuple[Run, Tensor]] = field(default_factory=list)

    def join(self) -> Tensor:
        covered = sum(run.stop - run.start for run, _ in self.new)
        if covered == self.old.shape[-1]:
            return self.new[0][1] if len(self.new) == 1 else torch.cat([x for _, x in self.new], dim=-1)
        out = self.old.clone()
        for run, x in self.new:
            run.of(out).copy_(x)
        return out


class Transition:
    """The transition stage of one or several live optimizers, with an optional clipping stage in front.

    Args:
        optimizers: live `torch.optim` optimizers; their groups are numbered through.
        wrt: names that will be differentiated (a rule may keep more state for them).
        clip: name of the clipping stage, None for none.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], wrt: frozenset[str], clip: str | None = None):
        self.optimizers, self.wrt = list(optimizers), wrt
        self.optimizer_of_group = [i for i, opt in enumerate(optimizers) for _ in opt.param_groups]
        self.rules: list[UpdateRule] = [
            rule_of(opt).from_group(group, wrt) for opt in optimizers for group in opt.param_groups
        ]
        self.params: list[Tensor] = [p for group in self.groups for p in group["params"]]
        _check_params(self.params)
        self.group_of = [i for i, group in enumerate(self.groups) for _ in group["params"]]
        self.sizes = [p.numel() for p in self.params]
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.ranges = [(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        self.slot_names = tuple(dict.fromkeys(name for rule in self.rules for name in rule.slots))
        known = {name for rule in self.rules for name in rule.hyperparameters}
        self.names = [
            name for name in dict.fromkeys(n for g in self.groups for n in g) if known.issuperset(parts(name))
        ]
        self.clip: Clip | None = None if clip is None else CLIPS[clip]()
        self._plans: dict[Any, list[Run]] = {}

    # ---- flat vectors and the live optimizer

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups of all optimizers, numbered through. Read anew: load_state_dict replaces them."""
        return [group for opt in self.optimizers for group in opt.param_groups]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One flat detached vector of tensors shaped like the parameters; None counts as zero."""
        return torch.cat(
            [
                p.new_zeros(p.numel()) if x is None else x.detach().reshape(-1)
                for p, x in zip(self.params, tensors, strict=True)
            ]
        )

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector [n] (or of one row of a tangent), shaped like the parameters."""
        return [x.view(p.shape) for p, x in zip(self.params, flat.split(self.sizes), strict=True)]

    def load(self, theta: Tensor) -> None:
        """Write θ into the live parameters, in place."""
        with torch.no_grad():
            for p, x in zip(self.params, self.split(theta), strict=True):
                p.copy_(x)

    def live_state(self, p: Tensor, group: int) -> dict[str, Any]:
        return self.optimizers[self.optimizer_of_group[group]].state.get(p, {})

    def counts(self) -> tuple[int, ...]:
        """Steps each parameter has taken. SGD keeps none; there, whether a momentum buffer exists is what matters."""
        out, steps = [0] * len(self.params), []
        for i, (p, group) in enumerate(zip(self.params, self.group_of, strict=True)):
            state = self.live_state(p, group)
            if torch.is_tensor(state.get("step")):
                steps.append((i, state["step"]))
            else:
                out[i] = int(state.get("step", state.get("momentum_buffer") is not None))
        if steps:
            for (i, _), t in zip(steps, torch.stack([s for _, s in steps]).tolist(), strict=True):
                out[i] = int(t)
        return tuple(out)

    def slots(self) -> Tensors:
        """The optimizer's tensors, flat; zeros where there are none yet."""
        live = [self.live_state(p, group) for p, group in zip(self.params, self.group_of, strict=True)]
        return {name: self.flatten([state.get(name) for state in live]) for name in self.slot_names}

    def read(self) -> State:
        return State(self.flatten(self.params), self.slots(), self.counts())

    def write(self, state: State) -> None:
        """Write θ, slots and step counts into the live optimizers, in place.

        A parameter that had taken no step in `state` gets an empty optimizer state, as torch.optim has it then.
        """
        self.load(state.theta)
        slots = {name: self.split(x) for name, x in state.slots.items()}
        for i, (p, group) in enumerate(zip(self.params, self.group_of, strict=True)):
            live = self.optimizers[self.optimizer_of_group[group]].state
            if state.counts[i] == 0:
                live.pop(p, None)
                continue
            for name in self.rules[group].slots:
                if torch.is_tensor(live[p].get(name)):
                    live[p][name].copy_(slots[name][i])
            if torch.is_tensor(live[p].get("step")):
                live[p]["step"].fill_(state.counts[i])

    def values(self) -> Values:
        """The hyperparameters' present values, read from the param groups."""
        groups = self.groups
        return {name: [_number(group.get(name)) for group in groups] for name in self.names}

    @property
    def maximizes(self) -> bool:
        return any(getattr(rule, "maximize", False) for rule in self.rules)

    def refresh(self) -> None:
        """Read the groups' flags anew: a momentum that was 0 and is not any more needs its buffer."""
        rules = [rule_of(opt).from_group(group, self.wrt) for opt in self.optimizers for group in opt.param_groups]
        if rules != self.rules:
            self.rules = rules
            self.slot_names = tuple(dict.fromkeys(name for rule in rules for name in rule.slots))

    # ---- the step and its derivatives

    def plan(self, counts: tuple[int, ...], active: tuple[bool, ...]) -> list[Run]:
        """The ranges of one step: neighbours in a group with the same step number are one range."""
        key = (counts, active)
        if key not in self._plans:
            self._plans = {key: list(self._runs(counts, active))}
        return self._plans[key]

    def _runs(self, counts: Sequence[int], active: Sequence[bool]) -> Iterator[Run]:
        open_run: Run | None = None
        for i, (start, stop) in enumerate(self.ranges):
            if not active[i] or start == stop:
                continue
            group, t = self.group_of[i], counts[i] + 1
            joins = open_run and self.rules[group].elementwise and (open_run.group, open_run.stop) == (group, start)
            if open_run and joins and open_run.t == t:
                open_run = Run(group, open_run.start, stop, t)
                continue
            if open_run:
                yield open_run
            open_run = Run(group, start, stop, t)
        if open_run:
            yield open_run

    def scalars(self, run: Run, values: Values) -> dict[str, float]:
        """The numbers h of one range."""
        out: dict[str, float] = {"t": run.t}
        for name, column in values.items():
            if name not in CLIPS and column[run.group] is not None:
                value = column[run.group]
                out |= dict(zip(parts(name), value if isinstance(value, tuple) else (value,), strict=True))
        return out

    def clipped(self, g: Tensor, values: Values) -> Tensor:
        return g if self.clip is None else self.clip.step(g, self.sizes, values[self.clip.name][0])

    def step(self, state: State, g: Tensor, active: tuple[bool, ...], values: Values) -> State:
        """One step from `state` with the flat gradient g [n]."""
        g = self.clipped(g, values)
        theta, slots = _Pieces(state.theta), {name: _Pieces(x) for name, x in state.slots.items()}
        for run in self.plan(state.counts, active):
            s = {name: run.of(state.slots[name]) for name in self.rules[run.group].slots}
            p, s = self.rules[run.group].step(run.of(state.theta), run.of(g), s, self.scalars(run, values))
            theta.new.append((run, p))
            for name, x in s.items():
                slots[name].new.append((run, x))
        return state.like(theta.join(), {name: x.join() for name, x in slots.items()}, active)

    def jvp(
        self,
        state: State,
        g: Tensor,
        active: tuple[bool, ...],
        values: Values,
        tangent: Tangent,
        dg: Tensor,
        seeds: Sequence[Tensors],
        clip_seed: Tensor | None = None,
    ) -> Tangent:
        """Push tangents through one step.

        Args:
            tangent: of θ and slots, [k, n].
            dg: tangent of g, [k, n].
            seeds: for each group, tangents of its scalars h by the rule's names, each [k, 1].
            clip_seed: tangent of the clipping threshold, [k, 1].
        """
        if self.clip is not None:
            m = values[self.clip.name][0]
            dg, g = self.clip.jvp(g, self.sizes, m, dg, clip_seed), self.clipped(g, values)
        theta, slots = _Pieces(tangent.theta), {name: _Pieces(x) for name, x in tangent.slots.items()}
        for run in self.plan(state.counts, active):
            rule = self.rules[run.group]
            s = {name: run.of(state.slots[name]) for name in rule.slots}
            ds = {name: run.of(tangent.slots[name]) for name in rule.slots}
            h, dp = self.scalars(run, values), run.of(tangent.theta)
            dp, ds = rule.jvp(run.of(state.theta), run.of(g), s, h, dp, run.of(dg), ds, seeds[run.group])
            theta.new.append((run, dp))
            for name, x in ds.items():
                slots[name].new.append((run, x))
        return Tangent(theta.join(), {name: x.join() for name, x in slots.items()})

    def vjp(
        self, state: State, g: Tensor, active: tuple[bool, ...], values: Values, adjoint: Tangent
    ) -> tuple[Tangent, Tensor, list[Tensors], Tensor | None]:
        """Pull an adjoint back through one step.

        Returns:
            the adjoint of (θ, slots) not counting the path through g; the adjoint of g [n]; for each group, the
            derivative in each of its scalars (0-d); the derivative in the clipping threshold.
        """
        raw, g = g, self.clipped(g, values)
        theta, slots = _Pieces(adjoint.theta), {name: _Pieces(x) for name, x in adjoint.slots.items()}
        lam_g = _Pieces(torch.zeros_like(g))
        lam_h: list[Tensors] = [{} for _ in self.groups]
        for run in self.plan(state.counts, active):
            rule = self.rules[run.group]
            s = {name: run.of(state.slots[name]) for name in rule.slots}
            ls = {name: run.of(adjoint.slots[name]) for name in rule.slots}
            h, lp = self.scalars(run, values), run.of(adjoint.theta)
            lp, lg, ls, lh = rule.vjp(run.of(state.theta), run.of(g), s, h, lp, ls)
            theta.new.append((run, lp))
            lam_g.new.append((run, lg))
            for name, x in ls.items():
                slots[name].new.append((run, x))
            for name, x in lh.items():
                lam_h[run.group][name] = lam_h[run.group].get(name, 0) + x.sum()
        out, lg, lam_clip = Tangent(theta.join(), {name: x.join() for name, x in slots.items()}), lam_g.join(), None
        if self.clip is not None:
            lg, lam_clip = self.clip.vjp(raw, self.sizes, values[self.clip.name][0], lg)
        return out, lg, lam_h, lam_clip

    def ill_conditioned_decay(self, state: State, g: Tensor, values: Values) -> list[int]:
        """Groups in which d/d(weight decay) passes through g/√v at g = v = 0 with a small eps."""
        out = []
        for i, rule in enumerate(self.rules):
            slot = rule.second_moment_of_decay
            if slot is None or values["weight_decay"][i] != 0 or values["eps"][i] >= WELL_CONDITIONED_EPS:
                continue
            mine = [r for r, group in zip(self.ranges, self.group_of, strict=True) if group == i]
            if any(bool(((g[a:b] == 0) & (state.slots[slot][a:b] == 0)).any()) for a, b in mine):
                out.append(i)
        return out


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(float(v) for v in value)
    return None if value is None else float(value)


def _check_params(params: Sequence[Tensor]) -> None:
    if not params:
        raise ValueError("the optimizer holds no parameters.")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("a parameter appears in two param groups: give it to one group of one optimizer.")
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) > 1:
        raise NotImplementedError(
            f"the optimizer's parameters have several dtypes or devices ({sorted(map(str, kinds))}): "
            "give all of them one dtype and one device."
        )
    if not params[0].is_floating_point():
        raise NotImplementedError(f"parameters of dtype {params[0].dtype}: use a real floating dtype.")
