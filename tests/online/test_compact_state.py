"""`state_dict(compact=True)`: how much smaller it is, and what training does from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad import policies
from tests.tiers import slow_but

NO_WAY_BACK = policies.without(policies.DEFAULT, policies.Backtracking, policies.DivergenceGuard)
STEPS, MIDDLE = 200, 150
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
}
SLOTS = {"SGD": 1, "AdamW": 2}


class Run:
    """A user's script."""

    def __init__(self, optimizer: str = "SGD", **kw: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 2))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.fixed = self.batch(500)
        tune = {"lr": hypergrad.Hyperparameter(bounds=(1e-6, 5e-3)), "weight_decay": None}
        options: dict[str, Any] = {"tune": tune, "total_steps": STEPS, "every": 5} | kw
        self.tuner = hypergrad.Tuner(self.model, self.optimizer, lambda: self.loss(self.fixed), **options)

    @staticmethod
    def batch(n: int) -> tuple[Tensor, Tensor]:
        """A fresh one: nothing is fitted too well."""
        x = torch.randn(n, 10)
        return x, (x[:, 0] + x[:, 1] * x[:, 2] + torch.randn(n) > 0).long()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def train(self, first: int, last: int, worse: float = 1.0) -> Run:
        for t in range(first, last):
            torch.manual_seed(t)
            self.optimizer.zero_grad()
            self.tuner.backward(worse * self.loss(self.batch(50)))
            self.optimizer.step()
        return self

    def goes_on_from(self, other: Run, compact: bool, path: Path) -> Run:
        states = other.model.state_dict(), other.optimizer.state_dict(), other.tuner.state_dict(compact=compact)
        torch.save(states, path)
        mine = self.model, self.optimizer, self.tuner
        for part, state in zip(mine, torch.load(path, weights_only=True), strict=True):
            part.load_state_dict(state)
        return self

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def held(state: Any) -> dict[int, int]:
    """Bytes of every tensor's storage, each once."""
    if isinstance(state, Tensor):
        return {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes()}
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return {key: size for x in inside for key, size in held(x).items()}


def weights_in(state: Any, run: Run) -> float:
    """Bytes over those of the weights, 4n."""
    return sum(held(state).values()) / (4 * len(run.weights))


REST = 0.2  # of [k]-vectors of the policies, beside 522 weights
# steps done, numbers tuned then
WHEN = {"at the start": (4, 1), "lr is tuned": (50, 1), "weight decay is tuned": (MIDDLE, 1), "nothing is": (195, 0)}


@pytest.mark.parametrize("when", slow_but(WHEN, "at the start", "lr is tuned"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_over_those_of_the_weights(name: str, when: str) -> None:
    """The table of docs/online.md."""
    steps, k = WHEN[when]
    run, s = Run(name).train(0, steps), SLOTS[name]
    assert len(run.tuner._loop.vector.moving) == k
    kept = k * (1 + s) + 1 + k + 1
    full, compact = (weights_in(run.tuner.state_dict(compact=x), run) for x in (False, True))
    assert kept <= compact <= kept + REST
    if steps > STEPS / 10:
        more = 2 * (1 + s / 2)  # and the weights of the lowest loss, where they are not the best ones
        assert kept + more <= full <= kept + more + REST or kept + more + 1 <= full <= kept + more + 1 + REST
    else:  # the optimizer's tensors before the first step are none
        assert compact + 1 <= full <= compact + 1 + REST


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "AdamW"))
@pytest.mark.parametrize("middle", [MIDDLE, *(pytest.param(t, marks=pytest.mark.slow) for t in (4, 50, 195))])
def test_goes_on_bit_for_bit_where_nothing_is_taken_back(name: str, middle: int, tmp_path: Path) -> None:
    whole, half = (Run(name, policies=NO_WAY_BACK) for _ in range(2))
    whole.train(0, STEPS)
    again = Run(name, policies=NO_WAY_BACK).goes_on_from(half.train(0, middle), True, tmp_path / "state.pt")
    again.train(middle, STEPS)
    assert torch.equal(again.weights, whole.weights)
    assert again.tuner.recipe() == whole.tuner.recipe() and again.tuner.best_val_loss == whole.tuner.best_val_loss


@pytest.mark.parametrize("middle", slow_but((4, 50, MIDDLE, 195), 50))
def test_goes_on_with_the_default_policies(middle: int, tmp_path: Path) -> None:
    """Nothing was taken back in the whole run, so it is the same."""
    whole, half = (Run(warm_start=False).train(0, last) for last in (STEPS, middle))
    assert whole.tuner.stats["backtracks"] == whole.tuner.stats["rollbacks"] == 0
    again = Run(warm_start=False).goes_on_from(half, True, tmp_path / "state.pt").train(middle, STEPS)
    assert torch.equal(again.weights, whole.weights)


@pytest.mark.filterwarnings("ignore:blow-up", "ignore:a loss", "ignore:a validation loss")
def test_a_blow_up_soon_after_goes_back_to_what_was_loaded(tmp_path: Path) -> None:
    half = Run().train(0, 60)
    again = Run().goes_on_from(half, True, tmp_path / "state.pt")
    loaded = again.weights.clone()
    again.train(60, 61)  # a step that is taken: the state before it is a good one
    again.train(61, 70, math.nan)
    assert again.tuner.stats["rollbacks"] == 1
    assert torch.equal(again.weights, loaded)
    assert again.train(70, 100).weights.isfinite().all()


def test_the_state_itself_stays_as_it_is() -> None:
    run = Run().train(0, 40)
    before = copy.deepcopy(run.tuner.state_dict())
    run.tuner.state_dict(compact=True)
    assert repr(run.tuner.state_dict()) == repr(before)
    assert run.tuner.state_dict().keys() == run.tuner.state_dict(compact=True).keys()
