"""Every update rule in every mode on the stand-in for a GPU: equal to the CPU, and meeting no host tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import hypergrad
from hypergrad import solvers
from tests import problems
from tests.cases import MODES, OPTIMIZERS, Case, case_of
from tests.device.stand_in import DEVICE, NAME, stand_in
from tests.oracle import MODES_AGREE, assert_same, hypergradient
from tests.problems import PROBLEMS

pytestmark = pytest.mark.slow

WAYS = {
    "forward": MODES["forward"],
    "graphs kept": MODES["graphs kept"],
    "every second step": MODES["every second step"],
    "no graph kept": {"mode": "unrolled", "graph_memory": 0},
    "checkpoints on the host": {"mode": "unrolled", "every": 2, "offload": "host"},
    "checkpoints on disk": {"mode": "unrolled", "every": 2, "offload": "disk"},
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stand_in():
        monkeypatch.setattr(problems, "DEVICE", NAME)
        yield


def on_host(result: hypergrad.Result) -> hypergrad.Result:
    initial = None if result.initial is None else [None if x is None else x.cpu() for x in result.initial]
    gradients = {name: x.cpu() for name, x in result.gradients.items()}
    return hypergrad.Result(result.value.cpu(), gradients, result.stats, initial)


def on_both(case: Case, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[hypergrad.Result, hypergrad.Result]:
    with stand_in(), monkeypatch.context() as patch:
        patch.setattr(problems, "DEVICE", NAME)
        there = on_host(hypergradient(case, **options))
    return there, hypergradient(case, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_rule_in_every_mode(optimizer: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = on_both(case_of(optimizer), monkeypatch, **WAYS[way])
    assert_same(there, here, MODES_AGREE)
    assert there.stats.get("replayed_exactly", True)
    for x, y in zip(there.initial or (), here.initial or (), strict=True):
        torch.testing.assert_close(x, y, rtol=MODES_AGREE, atol=0)


# an LSTM makes its tensors in C++
CARRIED = [name for name in PROBLEMS if name not in ("mlp", "matrices", "recurrent")]


@pytest.mark.parametrize("problem", CARRIED)
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_every_problem(problem: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(*on_both(Case(problem, "adamw"), monkeypatch, mode=mode), MODES_AGREE)


@pytest.mark.parametrize("clip", [{"clip_norm": 0.3}, {"clip_norm": 1e3}, {"clip_value": 0.05}])
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_clipping(clip: dict[str, float], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(*on_both(Case("mlp", "momentum", **clip), monkeypatch, mode=mode), MODES_AGREE)


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_numbers_of_every_step_and_several_validations(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("mlp", "adam", per_step=True, val_steps=(2, 6))
    assert_same(*on_both(case, monkeypatch, mode=mode), MODES_AGREE)


SOLVERS: dict[str, Any] = {
    "cg": solvers.cg,
    "neumann": solvers.neumann,
    "nystrom": partial(solvers.nystrom, rank=3),
    "warm start": solvers.WarmStart(solvers.cg),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("ridge", "sgd", wrt=("weight_decay",))
    assert_same(*on_both(case, monkeypatch, mode="implicit", solver=SOLVERS[solver]), MODES_AGREE)


def test_a_look_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(*on_both(Case("mlp", "momentum"), monkeypatch, mode="implicit", look_back=5), MODES_AGREE)


@pytest.mark.parametrize("per", ["parameter", "element"])
def test_one_number_for_each(per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("ridge", "momentum", wrt=("lr",))
    for mode in ("forward", "unrolled"):
        assert_same(*on_both(case, monkeypatch, mode=mode, per={"lr": per}), MODES_AGREE)


@pytest.mark.parametrize("way", ["forward", "graphs kept"])
def test_no_step_waits_for_the_device(way: str, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is read before the first step, after the last one, and while tangents are still zero."""
    waits = []
    for steps in (10, 40):
        monkeypatch.setattr(problems, "STEPS", steps)
        with DEVICE.aside():
            case = Case("mlp", "adamw_at_zero")
            case.build()
        DEVICE.clear()
        hypergradient(case, **WAYS[way])
        waits.append(sum(DEVICE.waits.values()))
    assert waits[0] == waits[1], waits


def test_the_model_and_optimizer_are_left_as_they_were(device: None) -> None:
    case = Case("cnn_batchnorm", "adamw")
    setup = case.build()
    state = [x.cpu() for x in (*setup.model.state_dict().values(),)]
    numbers = tree_map(lambda x: x, [group["lr"] for group in setup.optimizer.param_groups])
    hypergrad.hypergradient(setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, mode="unrolled")
    after = [x.cpu() for x in (*setup.model.state_dict().values(),)]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    assert numbers == [group["lr"] for group in setup.optimizer.param_groups]
