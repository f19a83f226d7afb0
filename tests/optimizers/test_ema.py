"""An average of the weights as a stage of the transition, against the stock loop with torch's own AveragedModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hypergrad
from tests.cases import Case
from tests.oracle import MODES_AGREE, assert_same, hypergradient
from tests.problems import STEPS, Setup
from tests.stock import Run, assert_right


class ValidatedInEvalMode(Case):
    """Its validation loss reads BatchNorm's running statistics."""

    def build(self) -> Setup:
        setup = super().build()
        val = setup.val_loss

        def val_loss() -> torch.Tensor:
            setup.model.eval()
            try:
                return val()
            finally:
                setup.model.train()

        setup.val_loss = val_loss
        return setup


RUNS: dict[str, Run] = {
    "momentum": Run(Case("mlp", "momentum"), ("lr", "momentum", "ema"), ema=0.7),
    "AdamW": Run(Case("mlp", "adamw"), ("lr", "weight_decay", "betas", "ema"), ema=0.7),
    "LAMB": Run(Case("mlp", "lamb"), ("lr", "ema"), ema=0.5),
    "Muon": Run(Case("matrices", "muon"), ("lr", "ema"), ema=0.5),
    "clipped, in the middle of a run": Run(Case("mlp_live", "momentum", clip_norm=0.245), ("lr", "clip_norm", "ema"), ema=0.7),
    "several validations": Run(Case("mlp", "adamw", val_steps=(0, 2, STEPS)), ("lr", "ema"), ema=0.7),
    "per step": Run(Case("mlp", "momentum"), ("lr", "ema"), ema=0.7, per_step=True),
    "a schedule of the decay": Run(Case("mlp", "momentum"), ("a", "ema", "lr"), {"a": 0.5},
        {"ema": lambda t, h: 1 - h["a"] / (1 + t)}, ema=0.5),
    "a schedule of both": Run(Case("mlp", "adamw"), ("a",), {"a": [0.5, 0.03]},
        {"ema": lambda t, h: h["a"][0], "lr": lambda t, h: h["a"][1] * 0.9**t}, ema=0.5),
    "in the loss": Run(Case("loss_hypers", "adamw"), ("weights", "penalty", "ema"), ema=0.6),
    "without a gradient": Run(Case("tied_frozen", "momentum"), ("lr", "ema"), ema=0.6),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_matches_the_stock_loop_and_forward(name: str) -> None:
    run = RUNS[name]
    unrolled = run.hypergradient(mode="unrolled")
    assert_right(run, unrolled)
    assert unrolled.gradients.get("ema", torch.ones(())).all()
    assert_same(run.hypergradient(mode="forward"), unrolled, MODES_AGREE)
    assert_same(run.hypergradient(mode="unrolled", every=1), unrolled, MODES_AGREE)


@pytest.mark.parametrize("per", ["parameter", "element"])
def test_per_parameter_and_element(per: str) -> None:
    """Mode against mode; the sums are the group's."""
    run = Run(Case("mlp", "adamw"), ("lr", "betas", "ema"), ema=0.7)
    forward, unrolled = (run.hypergradient(mode=mode, per=per) for mode in ("forward", "unrolled"))
    assert_same(forward, unrolled, MODES_AGREE)
    sizes = [2, 2] if per == "parameter" else [36, 21]
    sums = torch.stack([x.sum(0) for x in unrolled.gradients["betas"].split(sizes)])
    assert torch.allclose(sums, run.hypergradient().gradients["betas"], rtol=1e-9, atol=0)


def test_an_optimizer_without_a_rule() -> None:
    setup = Case("mlp", "momentum").build()
    results = [
        hypergrad.hypergradient(
            setup.model, torch.optim.ASGD(setup.model.parameters(), lr=0.1), setup.loss, setup.batches, setup.val_loss,
            ("lr", "ema"), mode, ema=0.7,
        ) for mode in ("forward", "unrolled")
    ]  # fmt: skip
    assert_same(*results)
    assert results[0].gradients["ema"] != 0


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_running_statistics_are_those_of_training(mode: str) -> None:
    """The average is of the weights alone."""
    run = Run(ValidatedInEvalMode("cnn_batchnorm", "momentum"), ("lr", "ema"), ema=0.6)
    assert_right(run, run.hypergradient(mode=mode))


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_the_ends(mode: str) -> None:
    """Decay 0: the weights themselves; decay 1: those at the start, whatever the optimizer does."""
    case = Case("mlp", "momentum", wrt=("lr", "weight_decay"))
    assert_same(hypergradient(case, mode=mode, ema=0.0), hypergradient(case, mode=mode), 1e-12)
    still = hypergradient(case, mode=mode, ema=1.0)
    assert float(still.value) == pytest.approx(float(case.build().val_loss().detach()), rel=1e-12)
    assert not any(x.any() for x in still.gradients.values())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "above 1": ({"ema": 1.1}, ValueError, "from 0 to 1"),
    "below 0": ({"ema": -0.1}, ValueError, "from 0 to 1"),
    "NaN": ({"ema": float("nan")}, ValueError, "from 0 to 1"),
    "implicit": (
        {"ema": 0.9, "mode": "implicit", "wrt": "weight_decay"},
        NotImplementedError,
        "ema needs mode='unrolled'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    changes, error, match = BAD[name]
    s = Case("mlp", "momentum").build()
    with pytest.raises(error, match=match):
        hypergrad.hypergradient(s.model, s.optimizer, s.loss, s.batches, s.val_loss, **changes)


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_everything_is_left_as_found(mode: str) -> None:
    """Also where a validation loss fails with the averaged weights in the model."""
    s = Case("cnn_batchnorm", "momentum").build()
    before = [x.clone() for x in s.model.state_dict().values()]
    calls = []

    def failing() -> torch.Tensor:
        calls.append(0)
        if len(calls) > 2:
            raise RuntimeError("no more")
        return s.val_loss()

    hypergrad.hypergradient(s.model, s.optimizer, s.loss, s.batches, s.val_loss, "lr", mode, ema=0.7)
    with pytest.raises(RuntimeError, match="no more"):
        hypergrad.hypergradient(
            s.model, s.optimizer, s.loss, s.batches, failing, "lr", mode, ema=0.7, val_steps=(1, 2, 3, 4)
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, s.model.state_dict().values(), strict=True))
    assert not s.optimizer.state
