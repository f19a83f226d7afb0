"""`hypergradient` at its door: bad input raises before anything changes, and the message says what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.cases import Case
from tests.problems import DEVICE, Setup, randn


def setup() -> Setup:
    return Case("mlp", "momentum").build()


def call(setup: Setup, **changes: Any) -> hypergrad.Result:
    arguments: dict[str, Any] = {
        "model": setup.model,
        "optimizer": setup.optimizer,
        "loss": setup.loss,
        "batches": setup.batches,
        "val_loss": setup.val_loss,
    }
    return hypergrad.hypergradient(**(arguments | changes))


def elsewhere() -> Tensor:
    return torch.zeros((), requires_grad=True) * 1


class OwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Not SGD any more, and its learning rate is a plain float when it is used."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-float(group["lr"]))


def other(cls: type[torch.optim.Optimizer], **numbers: Any) -> Callable[[Setup], dict[str, Any]]:
    return lambda s: {"optimizer": cls(s.model.parameters(), **numbers)}


def with_group(name: str, value: Any) -> Callable[[Setup], dict[str, Any]]:
    def change(s: Setup) -> dict[str, Any]:
        s.optimizer.param_groups[1][name] = value
        return {}

    return change


def mixed_dtypes(s: Setup) -> dict[str, Any]:
    s.model[2].float()
    return {}


def twice(s: Setup) -> dict[str, Any]:
    return {"optimizer": [s.optimizer, torch.optim.SGD(s.groups[0], lr=0.1)]}


Row = tuple[Callable[[Setup], dict[str, Any]], type[Exception], str]

BAD: dict[str, Row] = {
    # names
    "unknown name": (lambda s: {"wrt": "learning_rate"}, ValueError, r"'learning_rate'.*there are \['lr'"),
    "a name of another optimizer": (lambda s: {"wrt": ("lr", "betas")}, ValueError, "betas"),
    "half a pair": (
        lambda s: {"optimizer": torch.optim.Adam(s.model.parameters()), "wrt": "beta1"}, ValueError, "'betas'",
    ),
    "no names": (lambda s: {"wrt": (), "mode": "forward"}, ValueError, r"mode='unrolled'.*pass names"),
    "a name twice": (lambda s: {"wrt": ("lr", "lr")}, ValueError, "twice"),
    "a name that is no string": (lambda s: {"wrt": (0.1,)}, TypeError, "strings"),
    "clipping that is not on": (lambda s: {"wrt": "clip_norm"}, ValueError, "pass clip_norm="),
    "a key that is a name": (
        lambda s: {"wrt": "lr", "hypers": {"lr": 1.0}, "loss": lambda m, b, h: s.loss(m, b)}, ValueError, "rename",
    ),
    # hyperparameters in the loss
    "NaN in hypers": (lambda s: {"wrt": "c", "hypers": {"c": float("nan")}}, ValueError, "finite"),
    "hypers without a start": (lambda s: {"wrt": "c", "hypers": {"c": hypergrad.Hyperparameter()}}, ValueError, "start"),
    # modes and options
    "mode": (lambda s: {"mode": "reverse"}, ValueError, "forward, unrolled, implicit"),
    "option of another mode": (lambda s: {"mode": "forward", "every": 2}, ValueError, "'every'"),
    "unknown option": (lambda s: {"checkpoints": 2}, ValueError, "'checkpoints'"),
    "val_steps beyond the end": (lambda s: {"val_steps": (1, 7)}, ValueError, "0 to 6"),
    "val_steps negative": (lambda s: {"val_steps": (-1,)}, ValueError, "0 to 6"),
    "val_steps empty": (lambda s: {"val_steps": ()}, ValueError, "0 to 6"),
    "clip_norm negative": (lambda s: {"clip_norm": -1.0}, ValueError, "positive"),
    "clip_norm 0": (lambda s: {"clip_norm": 0.0}, ValueError, "positive"),
    "clip_value NaN": (lambda s: {"clip_value": float("nan")}, ValueError, "positive"),
    "both clippings": (lambda s: {"clip_norm": 1.0, "clip_value": 1.0}, ValueError, "not both"),
    # losses
    "loss not a scalar": (lambda s: {"loss": lambda m, b: m(b[0])}, ValueError, r"scalar.*\.mean\(\)"),
    "loss a number": (lambda s: {"loss": lambda m, b: 1.0}, TypeError, "scalar tensor"),
    "loss without a graph": (lambda s: {"loss": lambda m, b: s.loss(m, b).detach()}, ValueError, "no_grad"),
    "loss of nothing held": (lambda s: {"loss": lambda m, b: elsewhere()}, ValueError, "does not depend"),
    "val_loss not a scalar": (lambda s: {"val_loss": lambda: s.model(s.batches[0][0])}, ValueError, "scalar"),
    "val_loss a number": (lambda s: {"val_loss": lambda: 1.0}, TypeError, "scalar tensor"),
    "val_loss without a graph": (lambda s: {"val_loss": lambda: s.val_loss().detach()}, ValueError, "no_grad"),
    "val_loss of .item()": (lambda s: {"val_loss": lambda: s.val_loss().item()}, TypeError, r"without \.item\(\)"),
    "val_loss that counts": (
        lambda s: {"val_loss": lambda: (s.model(s.batches[0][0]) > 0).double().mean()}, ValueError, "accuracy",
    ),
    "val_loss whose batches end": (
        lambda s: {"val_loss": partial(next, iter(()))}, ValueError, r"again and again.*hypergrad\.validation",
    ),
    "val_loss of the model": (lambda s: {"val_loss": lambda model: model(s.batches[0][0]).mean()}, TypeError, "without"),
    "val_loss of another model": (lambda s: {"val_loss": elsewhere}, ValueError, "shares no parameter"),
    "loss a tensor": (lambda s: {"loss": s.val_loss()}, TypeError, r"loss must be a function loss\(model, batch\).*got Tensor"),
    "loss a criterion": (lambda s: {"loss": nn.MSELoss()}, ValueError, r"lambda model, batch: criterion\(model"),
    "loss of inputs and targets": (
        lambda s: {"loss": lambda x, y: nn.functional.mse_loss(s.model(x), y)}, ValueError, "lambda model, batch: criterion",
    ),
    "loss of one argument": (lambda s: {"loss": lambda model: 0}, ValueError, "what the loss takes"),
    # batches
    "no batches": (lambda s: {"batches": []}, ValueError, "at least one batch"),
    "batch the loss cannot take": (lambda s: {"batches": [s.batches[0], 3]}, ValueError, r"batch of type int"),
    "batch of another width": (
        lambda s: {"batches": [(randn(12, 4, seed=0), s.batches[0][1])]}, ValueError, "batch of type tuple",
    ),
    # models and optimizers
    "model a function": (lambda s: {"model": s.model.forward}, TypeError, "torch.nn.Module"),
    "optimizer a scheduler": (
        lambda s: {"optimizer": torch.optim.lr_scheduler.ConstantLR(s.optimizer)}, TypeError, "torch.optim.Optimizer",
    ),
    "no optimizer": (lambda s: {"optimizer": []}, ValueError, "empty"),
    "LBFGS": (other(torch.optim.LBFGS), NotImplementedError, "LBFGS has no update rule.*closure.*AdamW"),
    "a step that loses lr": (other(OwnStep, lr=0.1), NotImplementedError, "OwnStep.*hyperparameter `lr` is lost"),
    "a parameter in two optimizers": (twice, ValueError, "two param groups"),
    "several dtypes": (mixed_dtypes, NotImplementedError, "one dtype"),
    "lr NaN": (with_group("lr", float("nan")), ValueError, "lr"),
    "every 0": (lambda s: {"every": 0}, ValueError, "every"),
    "every negative": (lambda s: {"every": -2}, ValueError, "every"),
    "every a fraction": (lambda s: {"every": 1.5}, ValueError, "every"),
    "look_back 0": (lambda s: {"mode": "implicit", "look_back": 0}, ValueError, "look_back"),
    "look_back negative": (lambda s: {"mode": "implicit", "look_back": -2}, ValueError, "look_back"),
    "solver a name": (lambda s: {"mode": "implicit", "wrt": "weight_decay", "solver": "cg"}, TypeError, "hypergrad.solvers"),
    "solver of another shape": (
        lambda s: {"mode": "implicit", "wrt": "weight_decay", "solver": lambda matvec, b: b[1:]}, TypeError, "b's shape",
    ),
    "val_steps a fraction": (lambda s: {"val_steps": [1.5]}, ValueError, "0 to 6"),
    "solver and look_back": (
        lambda s: {"mode": "implicit", "look_back": 2, "solver": hypergrad.solvers.cg}, ValueError, "look_back",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, match = BAD[name]
    s = setup()
    changes = change(s)
    before, rng = [p.clone() for p in s.model.parameters()], torch.get_rng_state()
    with pytest.raises(error, match=match):
        call(s, **changes)
    assert all(torch.equal(a, b) for a, b in zip(before, s.model.parameters(), strict=True))
    assert not s.optimizer.state
    assert torch.equal(rng, torch.get_rng_state())


def test_batches_may_be_a_generator_or_a_loader() -> None:
    s = setup()
    want = call(s).gradients["lr"]
    assert torch.equal(call(s, batches=(b for b in s.batches)).gradients["lr"], want)
    rng = torch.get_rng_state()
    data = torch.utils.data.TensorDataset(randn(24, 5, seed=0), torch.arange(24, device=DEVICE) % 3)
    call(s, batches=torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    assert torch.equal(rng, torch.get_rng_state())


def test_one_name_or_several() -> None:
    s = setup()
    assert torch.equal(call(s, wrt="lr").gradients["lr"], call(s, wrt=["lr"]).gradients["lr"])
    assert call(s, wrt=("weight_decay", "lr")).gradients.keys() == {"weight_decay", "lr"}


def test_a_subclass_that_does_not_override_step() -> None:
    class Mine(torch.optim.SGD):
        """SGD under another name."""

    s = setup()
    mine = Mine(s.model.parameters(), lr=0.1, momentum=0.9)
    stock = torch.optim.SGD(s.model.parameters(), lr=0.1, momentum=0.9)
    assert torch.equal(call(s, optimizer=mine).gradients["lr"], call(s, optimizer=stock).gradients["lr"])


@pytest.mark.parametrize("hyper", [0.3, 1, torch.tensor(0.3), hypergrad.Hyperparameter(0.3)], ids=type)
def test_hypers_may_be_numbers_tensors_or_hyperparameters(hyper: Any) -> None:
    s = setup()

    def loss(model: nn.Module, batch: Any, hypers: dict[str, Tensor]) -> Tensor:
        return s.loss(model, batch) + hypers["c"] * model[2].weight.square().sum()

    result = call(s, loss=loss, wrt="c", hypers={"c": hyper})
    assert result.gradients["c"].shape == ()
    assert result.gradients["c"] != 0
