"""Online tuner: saved in the middle of a run, and gone on with; weights written from outside."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, SequentialLR

import hypergrad
from tests.online.live_loops import data, float64, mse, sgd, two_layers, validation
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture
MIDDLE = 7


def sequential(opt: Any) -> Any:
    return SequentialLR(opt, [LambdaLR(opt, lambda t: (t + 1) / 4), ExponentialLR(opt, 0.9)], [4])


SCHEDULES: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "exponential": lambda opt: ExponentialLR(opt, 0.9),
    "lambda": lambda opt: LambdaLR(opt, lambda t: 1 / (1 + t)),
    "warm-up from 0": lambda opt: LambdaLR(opt, lambda t: t / 12),
    "cosine": lambda opt: CosineAnnealingLR(opt, 12),
    "one cycle": lambda opt: OneCycleLR(opt, 0.1, total_steps=20),
    "two in a row": sequential,
}


class Run:
    """A user's script: everything is made in the same order each time."""

    def __init__(self, schedule: Callable[[Any], Any] | None, tuner_first: bool = True, tuned: bool = True, **kw: Any):
        self.model = two_layers()
        self.optimizer = sgd(momentum=0.9)(self.model)
        options = {"every": 3, **kw}
        make = lambda: hypergrad.Tuner(self.model, self.optimizer, validation(self.model), **options)  # noqa: E731
        first = make() if tuner_first else None
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.tuner = first or make()
        if not tuned:
            self.tuner.close()
        self.used: list[float] = []
        self.optimizer.register_step_pre_hook(lambda o, *_: self.used.extend(g["lr"] for g in o.param_groups))

    @property
    def parts(self) -> list[Any]:
        found = [self.model, self.optimizer, self.scheduler, self.tuner]
        return [x for x in found if x is not None]

    def train(self, first: int, last: int) -> None:
        for t, batch in list(enumerate(data()[0]))[first:last]:
            torch.manual_seed(t)
            self.optimizer.zero_grad()
            self.tuner.backward(mse(self.model, batch))
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()


@pytest.mark.slow
@pytest.mark.parametrize("tuner_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_run_with_a_scheduler_resumes_exactly(name: str, tuner_first: bool, tmp_path: Path) -> None:
    whole, half = (Run(SCHEDULES[name], tuner_first) for _ in range(2))
    whole.train(0, 12)
    half.train(0, MIDDLE)
    torch.save([x.state_dict() for x in half.parts], tmp_path / "state.pt")
    again = Run(SCHEDULES[name], tuner_first)
    for x, state in zip(again.parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        x.load_state_dict(state)
    again.train(MIDDLE, 12)
    assert again.used == whole.used[2 * MIDDLE :]
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(whole.tuner.values[k], again.tuner.values[k]) for k in whole.tuner.values)
    assert whole.tuner.stats == again.tuner.stats
    assert repr(whole.optimizer.param_groups[0]["lr"]) == repr(again.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
def test_run_resumes_exactly_whatever_is_loaded_first(order: tuple[int, ...]) -> None:
    whole, half, again = (Run(None) for _ in range(3))
    whole.train(0, 12)
    half.train(0, MIDDLE)
    states = [copy.deepcopy(x.state_dict()) for x in half.parts]
    for i in order:
        again.parts[i].load_state_dict(states[i])
    again.train(MIDDLE, 12)
    assert again.used == whole.used[2 * MIDDLE :]
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def weights_after(run: Run, state: dict[str, Any], name: str, lrs: list[float], factor: float) -> Tensor:
    """The weights after steps from MIDDLE on with torch alone, group 0's lr or weight decay times `factor`.

    lrs: of each step and group, one after another.
    """
    model = copy.deepcopy(run.model)
    opt = sgd(momentum=0.9)(model)
    opt.load_state_dict(copy.deepcopy(state))
    for t, batch in list(enumerate(data()[0]))[MIDDLE : MIDDLE + len(lrs) // 2]:
        torch.manual_seed(t)
        for i, group in enumerate(opt.param_groups):
            group["lr"] = lrs[2 * (t - MIDDLE) + i]
        opt.param_groups[0][name] *= factor if name == "lr" or t == MIDDLE else 1
        opt.zero_grad()
        mse(model, batch).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("name", "total", "new_total"), [("lr", 10, 40), ("weight_decay", 40, 20)])
def test_run_goes_on_at_another_length_where_another_number_is_tuned(name: str, total: int, new_total: int) -> None:
    """Longer, it is in the phase of lr again, shorter in that of weight decay: tangents are of its own steps since then."""
    options = {"every": 50, "warm_start": False}
    half, again = Run(None, total_steps=total, **options), Run(None, total_steps=new_total, **options)
    half.train(0, MIDDLE)
    with pytest.warns(UserWarning, match=f"total_steps={total}, this tuner has total_steps={new_total}"):
        for x, part in zip(again.parts, half.parts, strict=True):
            x.load_state_dict(copy.deepcopy(part.state_dict()))
    opt_state = copy.deepcopy(half.optimizer.state_dict())
    again.train(MIDDLE, MIDDLE + 4)
    tangent = again.tuner._loop.tangents.tangent
    assert tangent is not None
    assert [again.tuner._loop.vector.labels[j] for j in again.tuner._loop.vector.moving] == [f"{name}/0", f"{name}/1"]
    e = 1e-4
    up, down = (weights_after(half, opt_state, name, again.used, math.exp(x)) for x in (e, -e))
    torch.testing.assert_close(tangent.theta[0], (up - down) / (2 * e), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduler_is_never_changed_by_a_tuner(name: str) -> None:
    """What the scheduler writes is what it writes without one."""
    run, plain = Run(SCHEDULES[name]), Run(SCHEDULES[name], tuned=False)
    for t in range(12):
        run.train(t, t + 1)
        plain.train(t, t + 1)
        if run.scheduler is not None:
            assert [g["lr"] for g in run.optimizer.param_groups] == [g["lr"] for g in plain.optimizer.param_groups]


def test_state_saved_in_the_middle_is_not_changed_by_training_on() -> None:
    """As with torch's state_dicts, a copy is the user's to take."""
    run = Run(None)
    run.train(0, MIDDLE)
    state = copy.deepcopy(run.tuner.state_dict())
    run.train(MIDDLE, 12)
    run.tuner.load_state_dict(state)
    before = repr(state)
    with pytest.warns(UserWarning, match="weights at the first step after"):
        run.train(0, 5)
    assert repr(state) == before


def of_a_plain_run(schedule: Callable[[Any], Any] | None, lr: float, decay: float) -> list[Any]:
    """States of model, optimizer and scheduler after some steps without a tuner, with lr and weight decay of its own."""
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    opt.param_groups.clear()
    for group in sgd(momentum=0.9)(model).param_groups:
        opt.add_param_group(group | {"lr": lr, "weight_decay": decay})
    scheduler = schedule(opt) if schedule else None
    for t, batch in enumerate(data()[0][:MIDDLE]):
        torch.manual_seed(t)
        opt.zero_grad()
        mse(model, batch).backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()
    return [copy.deepcopy(x.state_dict()) for x in (model, opt, scheduler) if x is not None]


@pytest.mark.parametrize("tuner_first", [True, False])
@pytest.mark.parametrize("total", [None, 60])
@pytest.mark.parametrize("name", slow_but(["none", "lambda", "cosine"], "lambda"))
def test_states_without_the_tuners_are_gone_on_with_as_by_a_tuner_made_afterwards(
    name: str, total: int | None, tuner_first: bool
) -> None:
    """lr and weight decay of the other run were taken for what a schedule had written, over those of this one."""
    states = of_a_plain_run(SCHEDULES[name], lr=0.3, decay=0.2)
    options: dict[str, Any] = {"total_steps": total}
    one, other = Run(SCHEDULES[name], tuner_first, **options), Run(SCHEDULES[name], tuned=False)
    for run in (one, other):
        for x, state in zip(run.parts, copy.deepcopy(states), strict=False):
            x.load_state_dict(state)
    other.tuner = hypergrad.Tuner(other.model, other.optimizer, validation(other.model), every=3, **options)
    for t in range(12):
        for run in (one, other):
            run.train(t, t + 1)
        assert all(torch.equal(one.tuner.applied[k], other.tuner.applied[k]) for k in one.tuner.values), t
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_an_older_optimizer_state_loaded_in_mid_run_leaves_the_tuned_numbers_alone() -> None:
    run, states = Run(None), []
    run.train(0, 4)
    states = [copy.deepcopy(x.state_dict()) for x in run.parts[:2]]
    run.train(4, 10)
    before = run.tuner.values["lr"].clone()
    assert not torch.equal(before, torch.tensor([g["lr"] for g in states[1]["param_groups"]], dtype=torch.float64))
    for x, state in zip(run.parts, states, strict=False):
        x.load_state_dict(state)
    with pytest.warns(UserWarning, match="weights were written between two steps"):
        run.train(10, 11)
    assert torch.equal(run.tuner.applied["lr"], before)


# keys of these depend on the run: counts, names of values and of slots
RUN_DEPENDENT = {("stats",), ("loop", "used", "values"), ("tangents", "slots"), ("backtracking", "start")}


def test_truncated_state_leaves_the_tuner_unchanged() -> None:
    run, other = Run(None), Run(None)
    run.train(0, MIDDLE)
    other.train(0, 4)
    state = run.tuner.state_dict()

    def cut(path: tuple[str, ...]) -> dict[str, Any]:
        out = copy.deepcopy(state)
        inner = out
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return out

    def places(part: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, inner in part.items():
            yield (*at, key)
            if isinstance(inner, dict) and (*at, key) not in RUN_DEPENDENT:
                yield from places(inner, (*at, key))

    paths = list(places(state))
    assert ("recovery", "judge", "past", "mean") in paths and ("policies", "AdamOnPhi", "m") in paths
    before = repr(other.tuner.state_dict())
    for path in paths:
        with pytest.raises(ValueError, match="state_dict"):
            other.tuner.load_state_dict(cut(path))
        assert repr(other.tuner.state_dict()) == before, path


def test_tuner_is_not_copied_and_what_the_error_says_to_do_goes_on() -> None:
    run = Run(None)
    run.train(0, MIDDLE)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"make a new Tuner of the copies.*load_state_dict"):
            copied((run.model, run.optimizer, run.tuner) if copied is copy.deepcopy else run.tuner)
    twin = Run(None)
    twin.model = copy.deepcopy(run.model)
    twin.optimizer = sgd(momentum=0.9)(twin.model)
    twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    twin.tuner = hypergrad.Tuner(twin.model, twin.optimizer, validation(twin.model), every=3)
    twin.tuner.load_state_dict(copy.deepcopy(run.tuner.state_dict()))
    run.train(MIDDLE, 12)
    twin.train(MIDDLE, 12)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True))
    assert run.tuner.stats == twin.tuner.stats


# ---- modes that replay


def replaying(mode: str, **kw: Any) -> tuple[nn.Module, Any, hypergrad.Tuner]:
    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    validate = validation(model)

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    return model, opt, hypergrad.Tuner(model, opt, val_loss, loss=mse, mode=mode, every=4, horizon=4, **kw)


@pytest.mark.parametrize("mode", ["unrolled", "implicit", "forward"])
@pytest.mark.parametrize("middle", slow_but([0, 2, 4, 6], 2))
def test_modes_that_replay_go_on_from_a_state(mode: str, middle: int) -> None:
    batches = data()[0]
    parts = replaying(mode)
    for batch in batches[:middle]:
        parts[2].step(batch)
    states = [copy.deepcopy(x.state_dict()) for x in parts]
    again = replaying(mode)
    for x, state in zip(again, states, strict=True):
        x.load_state_dict(state)
    for x in (parts, again):
        torch.manual_seed(3)
        for batch in batches[middle:]:
            assert torch.isfinite(x[2].step(batch))
    assert again[2].stats["steps"] == 12
    if middle % 4 == 0:  # between windows
        assert all(torch.equal(p, q) for p, q in zip(parts[0].parameters(), again[0].parameters(), strict=True))
        assert all(torch.equal(parts[2].values[k], again[2].values[k]) for k in parts[2].values)


def outside(what: str, model: nn.Module, opt: Any) -> None:
    """What a loop may do between two steps."""
    with torch.no_grad():
        if what == "weights loaded":
            model.load_state_dict({k: 0.5 * x for k, x in model.state_dict().items()})
        elif what == "optimizer state loaded":
            state = copy.deepcopy(opt.state_dict())
            for slot in state["state"].values():
                if slot["momentum_buffer"] is not None:
                    slot["momentum_buffer"].mul_(0.5)
            opt.load_state_dict(state)
        else:
            opt.state.clear()


@pytest.mark.parametrize("what", ["weights loaded", "optimizer state loaded", "optimizer state cleared"])
def test_window_begins_anew_where_the_state_was_written_from_outside(what: str) -> None:
    """The hypergradient is that of the trajectory after it."""
    batches = data()[0]
    model, opt, tuner = replaying("unrolled")
    for batch in batches[:2]:
        tuner.step(batch)
    outside(what, model, opt)
    states = [copy.deepcopy(x.state_dict()) for x in (model, opt)]
    torch.manual_seed(5)
    for batch in batches[2:6]:
        tuner.step(batch)
    assert tuner.stats["hyper_steps"] == 1
    again = replaying("unrolled")
    for x, state in zip(again, states, strict=False):
        x.load_state_dict(state)
    again[2].close()
    torch.manual_seed(5)
    validate = validation(again[0])

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    exact = hypergrad.hypergradient(again[0], again[1], mse, batches[2:6], val_loss)
    for name in ("lr", "weight_decay"):
        torch.testing.assert_close(tuner.hypergradients[name], exact.gradients[name], rtol=1e-9, atol=0)
