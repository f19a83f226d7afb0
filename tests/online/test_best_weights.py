"""tuner.best(): weights and buffers at the best validation loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.core import host_copy
from hypergrad.core.problem import Problem
from hypergrad.online.best_weights import BestWeights
from hypergrad.optimizers.transition import Transition
from tests.online.live_loops import float64

__all__ = ["float64"]  # the fixture
EVERY, STEPS = 2, 20


# ---- the rule


def told(losses: Sequence[float]) -> tuple[BestWeights, Tensor]:
    """What is kept after these losses, the weights being 0, 1, 2, …; and the live weight."""
    weight = nn.Parameter(torch.zeros(1))
    best = BestWeights(
        Transition([torch.optim.SGD([weight], lr=1.0)], frozenset({"lr"})), Problem(nn.Module(), [weight], None)
    )
    for t, loss in enumerate(losses):
        weight.data.fill_(t)
        best.read(t, loss)
    return best, weight


NAN, INF = math.nan, math.inf
SEQUENCES: dict[str, tuple[list[float], int]] = {
    "the first": ([2.0], 0),
    "falls": ([9, 8, 7, 6, 5, 4, 3], 6),
    "rises": ([1, 2, 3], 0),
    "falls, then rises": ([9, 7, 5, 3, 1, 4, 4.5, 5], 4),
    # it turns at every reading, so from the fourth on means of 5 count, 2.42 at the dip and then 2.82, 2.42, 2.46, 2.04, 2.44
    "a lone dip in noise": ([4, 2, 4, 2, 4, 0.1, 4, 2, 2.2, 1.9, 2.1], 9),
    "a high reading at a low mean": ([4, 3, 4, 3, 4, 2, 3, 2, 3, 1, 2.3, 1.5, 2.4], 11),
    "not finite": ([NAN, 3, INF, 2, NAN, -INF, 2.4, NAN], 3),
    "constant": ([1, 1, 1, 1], 0),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_known_answer(name: str) -> None:
    losses, step = SEQUENCES[name]
    best, weight = told(losses)
    assert (best.step, best.loss) == (step, losses[step])
    with best.in_model():
        assert weight.item() == step
    assert weight.item() == len(losses) - 1


@pytest.mark.parametrize("losses", [[], [NAN, INF]])
def test_nothing_finite_was_read(losses: list[float]) -> None:
    best, _ = told(losses)
    with pytest.raises(RuntimeError, match="no finite validation loss"), best.in_model():
        pass
    assert best.sentence(5) is None and math.isnan(best.loss) and best.step == -1


def test_of_noisy_readings_the_lowest_is_not_taken() -> None:
    """Where the true loss falls to the end, what is kept is better than at the lowest reading."""
    draws = torch.Generator().manual_seed(0)
    t = torch.arange(150) / 150
    true = 0.35 + 1.5 * (-6 * t).exp() + 0.15 * (1 - t)
    kept = lowest = 0.0
    for _ in range(20):
        read = true + 0.03 * torch.randn(150, generator=draws)
        kept += float(true[told(read.tolist())[0].step] - true.min()) / 20
        lowest += float(true[read.argmin()] - true.min()) / 20
    assert kept < 0.75 * lowest


def test_sentence() -> None:
    best, _ = told([0.5, 0.38, 0.41234])
    assert best.sentence(2) == (
        "validation loss at the end 0.4123, best 0.38 at step 1 (tuner.best() has those weights)."
    )
    assert "at step 2, the last one read, 0.4123," in (best.sentence(7) or "")


# ---- in a loop


class Run:
    """A script with BatchNorm, dropout in training only, and a fixed validation set or a random batch of it."""

    def __init__(self, optimizers: Callable[[nn.Sequential], Any] | None = None, random: bool = False, **kw: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.x, self.y = torch.randn(96, 4), torch.randn(96, 1)
        made = (optimizers or OPTIMIZERS["sgd"])(self.model)
        self.optimizers = made if isinstance(made, list) else [made]
        self.random, self.read = random, [math.nan]
        self.tuner = hypergrad.Tuner(self.model, made, self.val_loss, every=EVERY, **kw)

    def val_loss(self) -> Tensor:
        rows = torch.randint(32, 64, (8,)) if self.random else torch.arange(32, 64)
        self.model.eval()
        loss = ((self.model(self.x[rows]) - self.y[rows]) ** 2).mean()
        self.model.train()
        self.read.append(loss.item())
        return loss

    def train(self, first: int, last: int, looking: bool = False) -> None:
        for t in range(first, last):
            rows = torch.randint(32, (8,))
            for opt in self.optimizers:
                opt.zero_grad()
            self.tuner.backward(((self.model(self.x[rows]) - self.y[rows]) ** 2).mean())
            for opt in self.optimizers:
                opt.step()
            if looking and t % 3 == 0:
                with self.tuner.best() as model:
                    model(self.x)  # in train mode: draws random numbers, moves running statistics

    def state(self) -> dict[str, Any]:
        return copy.deepcopy([x.state_dict() for x in (self.model, *self.optimizers)])  # type: ignore[return-value]


OPTIMIZERS: dict[str, Callable[[nn.Sequential], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
    "two": lambda m: [torch.optim.SGD(m[:2].parameters(), lr=0.1), torch.optim.AdamW(m[4].parameters(), lr=0.02)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no length": {},
    "known length": {"total_steps": STEPS},
    "live weights": {"average": False, "total_steps": STEPS},
    "frozen": {},
}
pytestmark = pytest.mark.filterwarnings("ignore:val_loss runs BatchNorm", "ignore:weight_decay is 0")


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_best_loss_is_had_again_with_the_best_weights(option: str, optimizer: str) -> None:
    run = Run(OPTIMIZERS[optimizer], **OPTIONS[option])
    if option == "frozen":
        run.tuner.freeze()
    with mock.patch.object(BestWeights, "read", autospec=True, side_effect=BestWeights.read) as read:
        run.train(0, STEPS)
    step, loss = run.tuner.best_step, run.tuner.best_val_loss
    readings = {call.args[1]: call.args[2] for call in read.call_args_list}
    assert step > 0 and step % EVERY == 0 and loss == readings[step]
    before = run.state()
    with run.tuner.best() as model:
        assert model is run.model
        assert run.val_loss().item() == loss
    assert same(run.state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_training_is_the_same_bit_for_bit_with_best_weights_looked_at_and_without(option: str, random: bool) -> None:
    ends = []
    for keep, looking in ((True, False), (True, True), (False, False)):
        run = Run(random=random, keep_best=keep, **OPTIONS[option])
        if option == "frozen":
            run.tuner.freeze()
        torch.manual_seed(1)
        run.train(0, STEPS, looking)
        ends.append((run.state(), run.tuner.values, run.tuner.stats, run.tuner.val_loss, torch.rand(1)))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_without_nothing_is_kept() -> None:
    run = Run(keep_best=False)
    run.train(0, 4)
    assert run.tuner.state_dict()["best"] is None
    assert math.isnan(run.tuner.best_val_loss) and run.tuner.best_step == -1
    with pytest.raises(RuntimeError, match="keep_best=True"), run.tuner.best():
        pass


def test_the_start_counts() -> None:
    """Where training makes things worse, the weights from before it are the best."""
    run = Run(lambda m: torch.optim.SGD(m.parameters(), lr=3.0), warm_start=False)
    start = copy.deepcopy(run.model.state_dict())
    assert (run.tuner.best_step, run.tuner.best_val_loss) == (0, run.read[1])
    run.tuner.freeze()
    run.train(0, 4)
    assert run.tuner.best_step == 0
    with run.tuner.best() as model:
        assert same(model.state_dict(), start)  # buffers of BatchNorm too
    assert not same(run.model.state_dict(), start)


def test_nothing_was_read_where_the_loss_needs_the_tuner() -> None:
    model = nn.Linear(2, 1)
    x = torch.randn(8, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = hypergrad.Tuner(model, opt, lambda: (model(x) ** 2).mean() + 0 * tuner.val_loss, every=EVERY)
    with pytest.raises(RuntimeError, match="every `every` steps"), tuner.best():
        pass


def test_what_was_there_comes_back_after_an_error() -> None:
    run = Run()
    run.train(0, STEPS)
    before = run.state()

    def fail(model: nn.Module) -> None:
        model(run.x)
        for p in model.parameters():
            p.data.zero_()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), run.tuner.best() as model:
        fail(model)
    assert same(run.state(), before)


@pytest.mark.parametrize("middle", [3, 8, 14])
def test_goes_on_from_a_state(middle: int, tmp_path: Path) -> None:
    runs = []
    for broken in (False, True):
        run = Run(total_steps=STEPS)
        torch.manual_seed(1)
        run.train(0, middle)
        if broken:
            rng = torch.get_rng_state()
            parts = (run.model, *run.optimizers, run.tuner)
            torch.save([x.state_dict() for x in parts], tmp_path / "state.pt")
            run = Run(total_steps=STEPS)
            parts = (run.model, *run.optimizers, run.tuner)
            for x, state in zip(parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
                x.load_state_dict(state)
            torch.set_rng_state(rng)
        run.train(middle, STEPS)
        runs.append(run)
    assert same(runs[0].tuner.state_dict(), runs[1].tuner.state_dict())


def test_states_of_tuners_that_keep_none_and_old_states() -> None:
    with_best, without = Run(), Run(keep_best=False)
    with_best.train(0, 6)
    without.train(0, 6)
    states = [copy.deepcopy(run.tuner.state_dict()) for run in (with_best, without)]
    without.tuner.load_state_dict(states[0])  # left out
    with_best.tuner.load_state_dict(states[1])  # nothing was read yet, at that run's weights
    assert with_best.tuner.best_step == -1 and without.tuner.state_dict()["best"] is None
    del states[0]["best"]
    with pytest.raises(ValueError, match="incomplete: it lacks best"):
        with_best.tuner.load_state_dict(states[0])


def test_the_copy_shares_no_memory() -> None:
    """With weights, buffers, averages or a state that was loaded."""
    run = Run()
    run.train(0, 6)
    state = copy.deepcopy(run.tuner.state_dict())
    run.tuner.load_state_dict(state)
    others = [*run.model.state_dict().values(), *state["best"]["tensors"]]
    others += [x for x in run.tuner.state_dict()["tangents"].values() if isinstance(x, Tensor)]
    kept = {x.data_ptr() for x in run.tuner.state_dict()["best"]["tensors"]}
    assert len(kept) == 4  # weights, and three buffers
    assert kept.isdisjoint(x.data_ptr() for x in others)


@pytest.mark.filterwarnings(
    "ignore:blow-up", "ignore:a loss", "ignore:a validation loss", "ignore:weights were written"
)
def test_a_blow_up_that_is_rolled_back_leaves_the_best_alone() -> None:
    run = Run(warm_start=False)
    run.train(0, STEPS)
    before = copy.deepcopy(run.tuner.state_dict()["best"])
    with torch.no_grad():
        run.model[4].weight.fill_(NAN)
    run.train(STEPS, STEPS + 1)
    assert run.tuner.stats["rollbacks"] == 1 and all(x.isfinite().all() for x in run.model.parameters())
    assert same(run.tuner.state_dict()["best"], before)
    run.train(STEPS + 1, 3 * STEPS)
    with run.tuner.best():
        assert run.val_loss().item() == run.tuner.best_val_loss


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_modes_that_replay(mode: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1), torch.randn(32, 3), torch.randn(32, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    mse = lambda m, batch: ((m(batch[0]) - batch[1]) ** 2).mean()  # noqa: E731
    val_loss = lambda: mse(model, (x[16:], y[16:]))  # noqa: E731
    tuner = hypergrad.Tuner(model, opt, val_loss, ("lr",), loss=mse, mode=mode, horizon=4, every=4)
    for _ in range(STEPS):
        tuner.step((x[:16], y[:16]))
    assert tuner.best_step > 0
    with tuner.best():
        assert val_loss().item() == pytest.approx(tuner.best_val_loss, rel=1e-14)


# ---- what is said


def test_what_the_runs_end_says(tmp_path: Path) -> None:
    run = Run(total_steps=STEPS + 1, log_dir=tmp_path)
    run.train(0, STEPS + 1)
    run.tuner.close()
    notes = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "tuner.best()" in line]
    assert len(notes) == 1  # at the last step, and not again by close
    assert f'"step": {STEPS + 1}' in notes[0] and f"at step {STEPS}, the last one read" in notes[0]


# ---- on a device


class Event:
    """Of a device whose copies have arrived once `synchronize` was called."""

    waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_a_copy_from_a_device_is_waited_for_where_it_is_used() -> None:
    events: list[Event] = []

    def mark(_: torch.device) -> Event:
        events.append(Event())
        return events[-1]

    with mock.patch.object(host_copy, "ASYNCHRONOUS", {"cpu"}), mock.patch.object(host_copy, "_event", mark):
        kept = host_copy.HostCopy(torch.device("cpu"))
        kept.pinned = False  # which takes a GPU
        for _ in range(2):
            kept.write([torch.ones(3)])
        assert [e.waited for e in events] == [0, 0]
        kept.read()
        kept.read()
        assert [e.waited for e in events] == [0, 1]  # what came later includes what came before


def test_what_was_given_to_a_state_is_not_overwritten() -> None:
    with (
        mock.patch.object(host_copy, "ASYNCHRONOUS", {"cpu"}),
        mock.patch.object(host_copy, "_event", return_value=Event()),
    ):
        kept = host_copy.HostCopy(torch.device("cpu"))
        kept.pinned = False  # which takes a GPU
        kept.write([torch.ones(3)])
        for i in (2.0, 3.0):
            (held,) = kept.give()
            kept.write([torch.full((3,), i)])
            assert held.tolist() == [i - 1] * 3 and kept.read()[0].tolist() == [i] * 3
        memory = kept.read()[0].data_ptr()
        kept.write([torch.zeros(3)])  # of its own: written over
        assert kept.read()[0].data_ptr() == memory
