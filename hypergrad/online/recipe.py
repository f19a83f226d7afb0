"""What a plain run should use, from a run that was tuned: values, and lr's shape as a scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.schedulers import ABSOLUTE, schedulers_of
from hypergrad.online.settled_values import SettledValues
from hypergrad.optimizers.group_values import plain, replaced

SHORT = 400  # steps below which a run is too short to go by
RISING = 1.5  # lr that has risen by so much over the last third of its phase has not come to rest
FEW = 16  # elements of a tensor in the loss that are written out
OWN, CONSTANT, YOURS = "warm-up and linear decay", "constant", "your scheduler's"


@dataclass(frozen=True)
class OptimizerRecipe:
    """One optimizer of a recipe.

    Attributes:
        name: of its class, dotted: torch.optim.SGD.
        groups: of every param group, argument of the optimizer → value. Those that are the constructor's default are left out,
            unless they were tuned. lr is the peak; where your scheduler goes on, what that scheduler starts from.
        every_parameter: whether it has one group, of all the model's parameters.
        shape: of lr: "warm-up and linear decay" (`hypergrad.schedules.scheduler`), "constant", "your scheduler's", or "" where
            lr was not tuned.
        schedulers: names of yours, with the learning rates that they are made with, as the tuned run used them.
    """

    name: str
    groups: list[dict[str, Any]]
    every_parameter: bool
    shape: str
    schedulers: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What a plain run should use. `print(recipe)` is Python code to paste.

    Attributes:
        steps: training steps of the tuned run so far.
        total_steps: as the tuner was told; None: not known.
        tuned: names of what was tuned.
        optimizers: what each is made with.
        hypers: name → value of the tensors in the loss that have few elements.
        large_hypers: names of the others, which `tuner.hypers` has.
        doubts: why it should not be trusted as it stands; empty: nothing is known against it.
    """

    steps: int
    total_steps: int | None
    tuned: list[str]
    optimizers: list[OptimizerRecipe]
    hypers: dict[str, Any]
    large_hypers: list[str]
    doubts: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All of it, and the code, as what JSON can hold."""
        return asdict(self) | {"code": self.code()}

    def code(self) -> str:
        """Python code that makes optimizer and scheduler.

        It reads `model`, or `groups`: the lists of parameters of the param groups, of all optimizers one after the other.
        """
        body: list[str] = []
        first = 0
        for i, each in enumerate(self.optimizers):
            end = "" if len(self.optimizers) == 1 else f"_{i + 1}"
            body += _made(each, f"optimizer{end}", first)
            body += _scheduled(each, f"optimizer{end}", f"scheduler{end}", self.total_steps)
            first += len(each.groups)
        text = "\n".join(body)
        modules = {each.name.rpartition(".")[0].split(".")[0] for each in self.optimizers} - {"", "torch"}
        imports = ["import torch"] if "torch." in text else []
        imports += ["import hypergrad"] if "hypergrad.schedules" in text else []
        imports += [
            f"import {each.name.rpartition('.')[0]}" for each in self.optimizers if each.name.split(".")[0] in modules
        ]
        return "\n".join([*dict.fromkeys(imports), *self._head("groups[" in text), text])

    def _head(self, by_group: bool) -> Iterator[str]:
        yield f"# From hypergrad.Tuner after {self.steps:,} steps; tuned: {', '.join(self.tuned)}."
        if self.doubts:
            yield "# Do not trust it as it stands:"
            yield from (f"#   {doubt}" for doubt in self.doubts)
        if by_group:
            yield "# groups: the lists of parameters of your param groups, in their order"
        for name, x in self.hypers.items():
            yield f"# in the loss: {name} = {x!r}"
        for name in self.large_hypers:
            yield f"# in the loss: {name}, as tuner.hypers[{name!r}] has it"

    __str__ = code


def _made(each: OptimizerRecipe, name: str, first: int) -> list[str]:
    """Lines that make an optimizer. first: the place of its first group among all."""

    def written(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={x!r}" for key, x in values.items())

    common = each.groups[0]
    if len(each.groups) == 1:
        params = "model.parameters()" if each.every_parameter else f"groups[{first}]"
        return [f"{name} = {each.name}({params}, {written(common)})"]
    lines = []
    for g, values in enumerate(each.groups):
        own = {key: x for key, x in values.items() if key not in common or common[key] != x}
        shown = "".join(f', "{key}": {x!r}' for key, x in own.items())
        lines.append(f'    {{"params": groups[{first + g}]{shown}}},')
    return [f"{name} = {each.name}([", *lines, f"], {written(common)})"]


def _scheduled(each: OptimizerRecipe, name: str, scheduler: str, total: int | None) -> list[str]:
    if each.shape == OWN:
        return [
            f"{scheduler} = hypergrad.schedules.scheduler({name}, total_steps={total})  # .step() after every {name}.step()"
        ]
    if each.shape == YOURS:
        lines = [f"# {scheduler}: your own, as it is, made of {name}"]
        for kind, numbers in each.schedulers.items():
            if numbers:
                lines.append(f"#   but {kind} with {', '.join(f'{key}={x!r}' for key, x in numbers.items())}")
        return lines
    return [f"# lr stays as it is: {name} was tuned without total_steps"] if each.shape == CONSTANT else []


def recipe_of(
    model: Module, writer: ParamGroupWriter, settled: SettledValues, counts: Mapping[str, int], t: int
) -> Recipe:
    """The recipe after t steps."""
    vector, transition = writer.vector, writer.transition
    names = list(dict.fromkeys(e.name for e in vector.entries))
    optimizers = [_optimizer(i, opt, model, writer, settled) for i, opt in enumerate(transition.optimizers)]
    small = {name: x.detach().tolist() for name, x in vector.hypers.items() if x.numel() <= FEW}
    large = [name for name in vector.hypers if name not in small]
    return Recipe(t, writer.total, names, optimizers, small, large, _doubts(writer, settled, counts, t))


def _optimizer(
    i: int, optimizer: Optimizer, model: Module, writer: ParamGroupWriter, settled: SettledValues
) -> OptimizerRecipe:
    transition, kind = writer.transition, type(optimizer)
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    mine = [g for g, of in enumerate(transition.optimizer_of_group) if of == i]
    groups = []
    for g in mine:
        group = transition.groups[g]
        values = {name: plain(group[name]) for name in defaults if name in group and name != "params"}
        if "lr" in values:
            values["lr"] = plain(group.get("initial_lr", values["lr"]))
        own = {name for name, x in values.items() if x != defaults[name] or name == "lr"}
        for j, entry in enumerate(writer.vector.entries):
            if entry.group == g:
                x = _rounded(settled.value(j), writer.vector.kinds[j].kind)
                values[entry.name] = replaced(values.get(entry.name), entry.name, entry.part, x)
                own.add(entry.name)
        groups.append({name: x for name, x in values.items() if name in own and _is_written(x)})
    lrs = [
        g
        for g in mine
        if ("lr", g) in writer.typed and any(e.name == "lr" and e.group == g for e in writer.vector.entries)
    ]
    scaled = [g for g in lrs if ("lr", g) in writer.bases]
    shape = YOURS if scaled else "" if not lrs else CONSTANT if writer.total is None else OWN
    theirs = _schedulers(
        optimizer, [(transition.groups[g], groups[mine.index(g)]["lr"] / writer.bases["lr", g]) for g in scaled]
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every = {id(p) for p in model.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    path = "torch.optim." + kind.__name__ if kind.__module__.startswith("torch.optim.") else _path(kind)
    return OptimizerRecipe(path, groups, len(mine) == 1 and trained <= held <= every, shape, theirs)


def _path(kind: type) -> str:
    local = kind.__module__ == "__main__" or "<locals>" in kind.__qualname__
    return kind.__name__ if local else f"{kind.__module__}.{kind.__qualname__}"


def _schedulers(optimizer: Optimizer, scaled: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, dict[str, Any]]:
    """The schedulers that write lr, and the learning rates that they are made with.

    Args:
        scaled: the groups whose lr they write, and what the recipe multiplies their numbers by.
    """
    if not scaled:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for each in schedulers_of(optimizer):
        numbers: dict[str, Any] = {}
        for name in ABSOLUTE:
            x = getattr(each, name, scaled[0][0].get(name) if name == "swa_lr" else None)
            x = x[0] if isinstance(x, (list, tuple)) and x else x
            if isinstance(x, (int, float)) and x:
                numbers[name.removesuffix("s")] = _rounded(x * scaled[0][1], "positive")
        if type(each).__name__ in ("OneCycleLR", "CyclicLR"):
            peaks = [
                _rounded(float(plain(group["max_lr"])) * factor, "positive")
                for group, factor in scaled
                if "max_lr" in group
            ]
            numbers |= {"max_lr": peaks[0] if len(peaks) == 1 else peaks} if peaks else {}
        found[type(each).__name__] = numbers
    return found


def _is_written(x: Any) -> bool:
    """Whether a value is one that Python code can write out."""
    if isinstance(x, (tuple, list)):
        return all(map(_is_written, x))
    return x is None or isinstance(x, (bool, int, float, str))


def _rounded(x: float, kind: str | None) -> float:
    """To four digits: of a number between 0 and 1 those of its distance from 1, as momentum's are what counts."""
    if kind in ("unit", "unit_high"):
        return round(1 - float(f"{1 - x:.4g}"), 12)
    return float(f"{x:.4g}")


def _doubts(writer: ParamGroupWriter, settled: SettledValues, counts: Mapping[str, int], t: int) -> list[str]:
    """Why a recipe should not be trusted."""
    vector, total = writer.vector, writer.total
    said: list[str] = []
    if counts["hyper_steps"] == 0:
        said.append("nothing moved: no hyperparameter step was taken.")
    if t < SHORT:
        said.append(f"the run had {t} steps: below {SHORT} numbers have hardly settled.")
    if total is not None and t < total:
        said.append(f"it is of the first {t:,} of {total:,} steps.")
    if counts["rollbacks"]:
        said.append(f"training blew up and was rolled back {_times(counts['rollbacks'])}: a plain run is not.")
    if counts["backtracks"]:
        said.append(f"the validation loss rose and was taken back {_times(counts['backtracks'])}: a plain run goes on.")
    for j, (entry, label) in enumerate(zip(vector.entries, vector.labels, strict=True)):
        if entry.group is None:
            continue
        at = [
            float(b)
            for b in (vector.low[j], vector.high[j])
            if math.isclose(float(vector.phi[j]), float(b), abs_tol=1e-9)
        ]
        if at:
            said.append(f"{label} is at a bound, {float(vector.value[j]):.4g}: beyond it may be better.")
        if counts["hyper_steps"] and not settled.tuned[j]:
            said.append(f"{label} was not tuned yet: its turn had not come.")
        if entry.name == "lr" and settled.rise(j) > math.log(RISING):
            said.append(
                f"{label} was still rising, {math.exp(settled.rise(j)):.2g} times in the last third of its phase: train longer."
            )
    return said


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
