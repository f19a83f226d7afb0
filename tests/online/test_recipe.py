"""What a plain run should use after a tuned one: values that have settled, the shape as a scheduler, and when to doubt them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

import hypergrad
from hypergrad import policies
from hypergrad.online.settled_values import MOST, SettledValues
from tests.tiers import slow_but

STEPS = 420
NO_WAY_BACK = policies.without(policies.DEFAULT, policies.Backtracking, policies.DivergenceGuard)
Run = tuple[hypergrad.Tuner, list[dict[str, float]]]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def two_groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": [*model[0].parameters()]},
        {"params": [*model[2].parameters()], "lr": 3e-3, "weight_decay": 1e-3},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Sequential], list[Optimizer]]] = {
    "SGD": lambda net: [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)],
    "AdamW, two groups": lambda net: [torch.optim.AdamW(two_groups(net), lr=1e-3, betas=(0.8, 0.99))],
    "two optimizers": lambda net: [
        torch.optim.SGD(net[0].parameters(), lr=1e-2, weight_decay=1e-4),
        torch.optim.Adam(net[2].parameters(), lr=1e-3, weight_decay=1e-4),
    ],
}
SCHEDULERS: dict[str, Callable[[Optimizer, float], torchs.LRScheduler]] = {
    "StepLR": lambda opt, factor: torchs.StepLR(opt, 100, 0.5),
    "CosineAnnealingLR": lambda opt, factor: torchs.CosineAnnealingLR(opt, STEPS, eta_min=1e-5 * factor),
    "OneCycleLR": lambda opt, factor: torchs.OneCycleLR(
        opt, 0.03 * factor, total_steps=STEPS + 1, cycle_momentum=False
    ),
}


TWO_GROUPS = "AdamW, two groups"


class Script:
    """A user's script of a tuned run."""

    def __init__(self, make: Callable[[nn.Sequential], list[Optimizer]], scheduler: Any = None, **kw: Any):
        self.model = net()
        self.optimizers = make(self.model)
        self.schedulers = [scheduler(opt, 1.0) for opt in self.optimizers] if scheduler else []
        draws = torch.Generator().manual_seed(1)
        self.x = torch.randn(400, 4, generator=draws)
        self.y = (torch.sin(2 * self.x[:, :1]) + self.x[:, 1:2] + torch.randn(400, 1, generator=draws) > 0).float()
        self.rows: list[dict[str, float]] = []
        kw = {"tune": ("lr", "weight_decay"), "every": 2, "total_steps": STEPS} | kw
        self.tuner = hypergrad.Tuner(
            self.model,
            self.optimizers,
            lambda: self.loss(200, 400),
            on_log=lambda row, step: self.rows.append(row),
            **kw,
        )
        self.shapes: dict[int, list[float]] = {}  # of lr, in the steps after which no hyperparameter step comes
        self.t = 0

    def loss(self, first: int, last: int) -> Tensor:
        return binary_cross_entropy_with_logits(self.model(self.x[first:last]), self.y[first:last])

    def train(self, steps: int) -> Script:
        for _ in range(steps):
            for opt in self.optimizers:
                opt.zero_grad()
            first = self.t * 20 % 200
            self.tuner.backward(self.loss(first, first + 20))
            for opt in self.optimizers:
                opt.step()
            if "lr" in self.tuner.values and self.t % 2 == 0:
                self.shapes[self.t] = (self.tuner.applied["lr"] / self.tuner.values["lr"]).tolist()
            for each in self.schedulers:
                each.step()
            self.t += 1
        return self

    def pasted(self) -> dict[str, Any]:
        """The names that the printed code makes, for a model of its own."""
        model = net()
        groups = [group["params"] for opt in OPTIMIZERS_OF(self, model) for group in opt.param_groups]
        names: dict[str, Any] = {"model": model, "groups": groups}
        exec(str(self.tuner.recipe()), names)
        return names


@cache
def to_the_end(name: str) -> Script:
    """A whole run, which several tests look at."""
    return Script(OPTIMIZERS[name]).train(STEPS)


def OPTIMIZERS_OF(script: Script, model: nn.Sequential) -> list[Optimizer]:
    """Of a model, with the param groups of the script's."""
    places = {id(p): name for name, p in script.model.named_parameters()}
    own = dict(model.named_parameters())
    return [
        torch.optim.SGD([{"params": [own[places[id(p)]] for p in g["params"]]} for g in opt.param_groups], lr=1.0)
        for opt in script.optimizers
    ]


def made(names: dict[str, Any], what: str, n: int) -> list[Any]:
    return [names[what]] if n == 1 else [names[f"{what}_{i + 1}"] for i in range(n)]


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, TWO_GROUPS))
def test_printed_code_makes_the_optimizer_and_its_lr_at_every_step(name: str) -> None:
    script = to_the_end(name)
    recipe, n = script.tuner.recipe(), len(script.optimizers)
    names = script.pasted()
    optimizers, schedulers = made(names, "optimizer", n), made(names, "scheduler", n)
    for plain, tuned in zip(optimizers, script.optimizers, strict=True):
        assert type(plain) is type(tuned)
        for group, other in zip(plain.param_groups, tuned.param_groups, strict=True):
            assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
            fixed = set(other) - {"params", "lr", "weight_decay", "initial_lr"}
            assert {key: group[key] for key in fixed} == {key: other[key] for key in fixed}
    peaks = [group["lr"] for each in recipe.optimizers for group in each.groups]
    warmup, used = STEPS // 100, {t: shape for t, shape in script.shapes.items() if t > 50}  # of tuner.applied
    for t in range(STEPS):
        shape = (t + 1) / (warmup + 1) if t < warmup else (STEPS - t) / (STEPS - warmup)
        lrs = [group["lr"] for opt in optimizers for group in opt.param_groups]
        assert lrs == pytest.approx([peak * shape for peak in peaks], rel=1e-12)
        assert [shape] * len(lrs) == pytest.approx(used.get(t, [shape] * len(lrs)), rel=1e-9)  # of tuner.applied
        for opt, scheduler in zip(optimizers, schedulers, strict=True):
            opt.step()
            scheduler.step()


def geometric(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def test_values_are_the_means_over_the_last_third_of_their_phases() -> None:
    """lr is tuned in the first 30 %, on while it climbs, and weight decay up to 90 %: in 120 readings at most."""
    script = Script(OPTIMIZERS["SGD"], policies=NO_WAY_BACK, total_steps=400).train(400)
    rows = script.rows[1:]
    tuned = {
        tag: [row[f"hyper/{tag}"] for row in rows if f"val_hypergradient/{tag}" in row]
        for tag in ("lr_scale", "weight_decay")
    }
    assert len(tuned["lr_scale"]) + len(tuned["weight_decay"]) == 0.9 * 400 / 2
    (group,) = script.tuner.recipe().optimizers[0].groups
    for name, tag in (("lr", "lr_scale"), ("weight_decay", "weight_decay")):
        xs = tuned[tag]
        assert len(xs) <= MOST
        assert group[name] == pytest.approx(geometric(xs[-math.ceil(len(xs) / 3) :]), rel=1e-3)
        assert len(set(xs)) > len(xs) / 2


def test_momentum_keeps_the_digits_of_its_distance_from_1() -> None:
    script = Script(OPTIMIZERS["SGD"], tune={"momentum": hypergrad.Hyperparameter(0.99987654)}, hyper_lr=1e-9).train(40)
    (group,) = script.tuner.recipe().optimizers[0].groups
    assert group["momentum"] == 0.9998765


@pytest.mark.parametrize("n", [7, MOST, MOST + 1, 1000, 5000])
def test_long_phases_are_thinned(n: int) -> None:
    """Of φ = 0, 1, … the mean over the last third is 5/6 of the last, to the distance of what is kept."""
    writer = SimpleNamespace(vector=OneNumber(), bases={})
    settled = SettledValues(writer, dict.fromkeys(("rollbacks", "backtracks", "false_alarms"), 0))  # type: ignore[arg-type]
    for i in range(n):
        writer.vector.phi = [float(i)]
        settled.note()
    assert len(settled.kept[0]) <= MOST
    assert settled.value(0) == pytest.approx(5 / 6 * (n - 1), abs=max(1.5, 1.5 * settled.stride[0]))


class OneNumber:
    """Stands in for the vector of φ."""

    def __init__(self):
        self.entries = [SimpleNamespace(name="lr", group=0)]
        self.kinds, self.moving, self.phi, self.value = [hypergrad.Hyperparameter(kind="free")], [0], [0.0], [0.0]

    def __len__(self) -> int:
        return 1


@pytest.mark.filterwarnings("ignore:blow-up")
def test_what_lr_was_before_a_cut_is_forgotten() -> None:
    script = Script(OPTIMIZERS["SGD"], policies=NO_WAY_BACK).train(60)
    script.tuner._loop.recovery._cut_after_roll_back(60, 4.0, 1.0, 0.5)
    now = script.tuner.values["lr"].item()

    def lr() -> float:
        return script.tuner.recipe().optimizers[0].groups[0]["lr"]

    assert lr() == pytest.approx(now, rel=1e-3)
    script.train(18)
    since = [row["hyper/lr_scale"] for row in script.rows[-9:]]
    assert lr() == pytest.approx(geometric(since[-3:]), rel=1e-3)
    assert any("rolled back once" in doubt for doubt in script.tuner.recipe().doubts)


@pytest.mark.parametrize("middle", slow_but((30, 200, 399), 200))
def test_resumed_run_gives_the_same_recipe(middle: int) -> None:
    whole = to_the_end(TWO_GROUPS)
    half, again = (Script(OPTIMIZERS[TWO_GROUPS]) for _ in range(2))
    half.train(middle)
    for name in ("model", "tuner"):
        getattr(again, name).load_state_dict(copy.deepcopy(getattr(half, name).state_dict()))
    again.optimizers[0].load_state_dict(copy.deepcopy(half.optimizers[0].state_dict()))
    again.train(STEPS - middle)
    assert again.tuner.recipe() == whole.tuner.recipe()
    assert json.loads(json.dumps(whole.tuner.recipe().to_dict()))["code"] == whole.tuner.recipe().code()


@pytest.mark.filterwarnings("ignore:CosineAnnealingLR has eta_min")
@pytest.mark.parametrize("name", slow_but(SCHEDULERS, "StepLR"))
def test_beside_a_scheduler_the_shape_stays_the_users(name: str) -> None:
    """Made with what the recipe says, the scheduler writes the lr of the tuned run's shape at the recipe's scale."""
    script = Script(OPTIMIZERS["SGD"], SCHEDULERS[name]).train(STEPS)
    (made,) = script.tuner.recipe().optimizers
    assert made.shape == "your scheduler's" and list(made.schedulers) == [name]
    code = script.tuner.recipe().code()
    assert "hypergrad.schedules" not in code and "# scheduler: your own, as it is, made of optimizer" in code
    assert (f"#   but {name} with" in code) == bool(made.schedulers[name])
    names, lr = script.pasted(), made.groups[0]["lr"]
    typed = 0.03 / 25 if name == "OneCycleLR" else 1e-3
    factor = lr / typed
    given = {"StepLR": {}, "CosineAnnealingLR": {"eta_min": 1e-5 * factor}, "OneCycleLR": {"max_lr": 0.03 * factor}}
    assert made.schedulers[name] == pytest.approx(given[name], rel=1e-3)
    optimizer = names["optimizer"]
    scheduler = SCHEDULERS[name](optimizer, factor)
    for t in range(STEPS):
        if t in script.shapes:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * script.shapes[t][0], rel=1e-3)
        optimizer.step()
        scheduler.step()


def test_a_scheduler_of_schedulers_is_told_as_one() -> None:
    """Those inside are named where a number in them changes, as absolute learning rates do."""

    def nested(optimizer: Optimizer, _: float) -> torchs.SequentialLR:
        warm = torchs.LinearLR(optimizer, 0.1, total_iters=10)
        return torchs.SequentialLR(optimizer, [warm, torchs.CosineAnnealingLR(optimizer, STEPS)], milestones=[10])

    code = Script(OPTIMIZERS["SGD"], nested).train(40).tuner.recipe().code()
    assert code.endswith("\n# scheduler: your own, as it is, made of optimizer")


def test_without_total_steps_lr_is_constant_and_what_is_not_tuned_stays() -> None:
    script = Script(OPTIMIZERS["SGD"], total_steps=None).train(40)
    assert script.tuner.recipe().optimizers[0].shape == "constant"
    assert "scheduler" not in script.pasted()
    fixed = Script(OPTIMIZERS["AdamW, two groups"], tune="weight_decay").train(40)
    (made,) = fixed.tuner.recipe().optimizers
    assert made.shape == "" and [group["lr"] for group in made.groups] == [1e-3, 3e-3]


def test_tensors_in_the_loss_are_told() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    few, many = torch.tensor(0.25), torch.zeros(100)
    tuner = hypergrad.Tuner(
        model,
        opt,
        lambda: model(torch.ones(2, 4)).square().mean(),
        tune={},
        hypers={"few": few, "many": many},
        mode="forward",
    )
    recipe = tuner.recipe()
    assert recipe.hypers == {"few": 0.25} and recipe.large_hypers == ["many"]
    assert "# in the loss: few = 0.25" in str(recipe) and "tuner.hypers['many']" in str(recipe)


DOUBTS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "nothing moved": ({}, 1, ["nothing moved", "had 1 steps", "first 1 of 420"]),
    "short": ({"total_steps": 300}, 300, ["had 300 steps"]),
    "half": ({}, 410, ["first 410 of 420"]),
    "before weight decay's turn": ({}, 100, ["had 100", "first 100", "weight_decay/0 was not tuned yet"]),
    "at a bound": (
        {"tune": {"lr": hypergrad.Hyperparameter(1e-4, bounds=(1e-5, 2e-4))}, "total_steps": None},
        STEPS,
        ["lr/0 is at a bound, 0.0002"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(DOUBTS, "nothing moved", "short", "before weight decay's turn"))
def test_doubts(name: str) -> None:
    options, steps, said = DOUBTS[name]
    recipe = Script(OPTIMIZERS["SGD"], **options).train(steps).tuner.recipe()
    for words in said:
        assert any(words in doubt for doubt in recipe.doubts), (words, recipe.doubts)
        assert words in str(recipe)


def test_a_run_to_its_end_is_not_doubted() -> None:
    recipe = Script(OPTIMIZERS["SGD"], policies=NO_WAY_BACK).train(STEPS).tuner.recipe()
    assert recipe.doubts == []
    assert "Do not trust" not in str(recipe)


@pytest.mark.parametrize("total", [0, -1, 2.5, True, None])
def test_scheduler_says_what_total_steps_is(total: Any) -> None:
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"epochs \* len\(train_loader\)"):
        hypergrad.schedules.scheduler(opt, total)
    assert opt.param_groups[0]["lr"] == 0.1 and "initial_lr" not in opt.param_groups[0]


def test_scheduler_resumes() -> None:
    """By torch's own state_dict, which holds no function."""

    def lrs(first: int, last: int, state: Any = None) -> tuple[list[float], Any]:
        opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        each = hypergrad.schedules.scheduler(opt, 200)
        if state is not None:
            opt.load_state_dict(state[0])
            each.load_state_dict(state[1])
        found = []
        for _ in range(first, last):
            found.append(opt.param_groups[0]["lr"])
            opt.step()
            each.step()
        return found, copy.deepcopy((opt.state_dict(), each.state_dict()))

    whole, half = lrs(0, 200), lrs(0, 77)
    assert half[0] + lrs(77, 200, half[1])[0] == whole[0]
