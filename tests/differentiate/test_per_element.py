"""Hypergradients per parameter tensor and per element, against the stock optimizer with one param group for each of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import hypergrad
from hypergrad import Result
from tests import references
from tests.cases import Case
from tests.oracle import (
    AGREE,
    DEFAULT_WIDTH,
    MODES_AGREE,
    ROUNDING,
    WIDTH,
    assert_same,
    derivative,
    hypergradient,
    shifted,
)
from tests.problems import Setup

CASES: dict[str, list[Case]] = {
    "parameter": [
        Case("mlp", "momentum", wrt=("lr", "weight_decay", "momentum")),
        Case("mlp", "adamw", wrt=("lr", "weight_decay", "betas")),
        Case("mlp", "adamw", clip_norm=0.245, wrt=("lr", "clip_norm")),
        Case("mlp", "lamb", wrt=("lr", "weight_decay", "betas", "eps")),
        Case("mlp", "nadam", wrt=("lr", "betas", "momentum_decay")),
        Case("mlp", "adafactor", wrt=("lr", "weight_decay", "d")),
        Case("matrices", "muon", wrt=("lr", "momentum")),
        Case("mlp", "momentum", per_step=True, wrt=("lr",)),
    ],
    "element": [
        Case("quadratic", "momentum"),
        Case("quadratic", "nesterov"),
        Case("quadratic", "adamw"),
        Case("quadratic", "adam"),
        Case("quadratic", "rmsprop_momentum"),
        Case("quadratic", "adagrad"),
        Case("quadratic", "adamax"),
        Case("quadratic", "radam"),
        Case("quadratic", "adadelta"),
        Case("quadratic", "adamw", clip_value=0.6, wrt=("lr", "weight_decay")),
        Case("quadratic", "adamw", per_step=True, wrt=("lr",)),
        Case("dropout", "adamw", wrt=("lr", "weight_decay")),
    ],
}
MOST = 6  # numbers of one array that are compared with finite differences, evenly spread
EACH = [(how, case) for how, cases in CASES.items() for case in cases]


class Pieces:
    """A case whose optimizer has one param group for each parameter, or for each element as a parameter of its own."""

    def __init__(self, case: Case, how: str):
        self.case, self.setup, self.pieces, groups = case, case.build(), [], []
        row = case.row
        cls = references.third_party(row.cls) if isinstance(row.cls, str) else row.cls
        for params, numbers in zip(self.setup.groups, ({}, row.second), strict=True):
            for p in params:
                flat = p.detach().clone().reshape(-1) if how == "element" else [p.detach().clone()]
                mine = [torch.nn.Parameter(x.clone()) for x in flat]
                self.pieces.append((p, mine))
                groups += [{"params": [x], **numbers} for x in mine]
        self.optimizer = cls(groups, **row.first)

    def assembled(self) -> dict[str, Tensor]:
        values = {p: torch.stack([x.reshape(p.shape if len(mine) == 1 else ()) for x in mine]).view(p.shape)
                  for p, mine in self.pieces}  # fmt: skip
        return {name: values[p] for name, p in self.setup.model.named_parameters()}

    def run(self, name: str, index: tuple[int, ...], delta: float) -> float:
        """The validation loss with one number of one group moved."""
        setup, case = self.setup, self.case
        when, index = (index[0], index[1:]) if case.per_step and index else (None, index)
        for t, batch in enumerate(setup.batches):
            clip, undo = dict(case.clip), lambda: None
            if name and when in (None, t):
                if name in clip:
                    clip[name] += delta
                elif name == "initial_accumulator_value":
                    if t == 0:
                        state = self.optimizer.state[self.optimizer.param_groups[index[0]]["params"][0]]
                        state["sum"] += delta
                else:
                    group = self.optimizer.param_groups[index[0]]
                    before = group[name]
                    group[name], undo = shifted(before, index, delta), lambda g=group, x=before: g.update({name: x})
            self.optimizer.zero_grad()
            now = self.assembled()
            setup.loss(lambda *args, now=now: functional_call(setup.model, now, args), batch).backward()
            params = [x for _, mine in self.pieces for x in mine]
            if "clip_norm" in clip:
                torch.nn.utils.clip_grad_norm_(params, clip["clip_norm"])
            if "clip_value" in clip:
                torch.nn.utils.clip_grad_value_(params, clip["clip_value"])
            self.optimizer.step()
            undo()
        with torch.no_grad():
            for key, p in setup.model.named_parameters():
                p.copy_(self.assembled()[key])
            return float(setup.val_loss())


def stock(case: Case, how: str, name: str = "", index: tuple[int, ...] = (), delta: float = 0.0) -> float:
    pieces = Pieces(case, how)
    with case.arithmetic():
        return pieces.run(name, index, delta)


def finite_difference(case: Case, how: str, name: str, index: tuple[int, ...]) -> float:
    if name in case.clip:
        value: Any = case.clip[name]
    else:
        value = Pieces(case, how).optimizer.param_groups[index[1 if case.per_step else 0]][name]
        value = value[index[-1]] if isinstance(value, tuple) else value
    h = WIDTH.get(name, DEFAULT_WIDTH) * max(abs(value), 0.02)
    return derivative(lambda d: stock(case, how, name, index, d), h, what=f"{name}{list(index)} of {case}")


def some(array: Tensor) -> list[tuple[int, ...]]:
    every = list(product(*map(range, array.shape)))
    return every[:: max(1, len(every) // MOST)]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "case"), EACH, ids=lambda x: str(x))
def test_matches_the_stock_optimizer_with_a_group_for_each(how: str, case: Case) -> None:
    result = hypergradient(case, per=how)
    assert float(result.value) == pytest.approx(stock(case, how), rel=1e-12)
    for name, array in result.gradients.items():
        assert name in case.clip or array.shape[1 if case.per_step else 0] == units(case.build(), how)
        for index in some(array):
            got, want = float(array[index]), finite_difference(case, how, name, index)
            assert abs(got - want) <= AGREE * abs(want) + ROUNDING, f"d/d {name}{list(index)}: {got}, should be {want}"


def units(setup: Setup, how: str) -> int:
    params = [p for group in setup.groups for p in group]
    return len(params) if how == "parameter" else sum(p.numel() for p in params)


AGAINST = [
    *EACH,
    ("parameter", Case("mlp_live", "adamw", clip_norm=0.245)),  # in the middle of a run
    ("parameter", Case("tied_frozen", "momentum", wrt=("lr", "weight_decay"))),  # parameters without a gradient
    ("parameter", Case("cnn_batchnorm", "momentum", val_steps=(1, 3), wrt=("lr", "momentum"))),
    ("parameter", Case("matrices_live", "muon", wrt=("lr", "weight_decay", "ns_coefficients"))),
    ("element", Case("mlp_live", "adam_amsgrad", wrt=("lr",))),
    ("element", Case("mlp", "lion", wrt=("lr", "weight_decay"))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "case"), AGAINST, ids=lambda x: str(x))
def test_mode_against_mode(how: str, case: Case) -> None:
    assert_same(hypergradient(case, per=how, mode="forward"), hypergradient(case, per=how), MODES_AGREE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
@pytest.mark.parametrize(("how", "case"), AGAINST, ids=lambda x: str(x))
def test_sums_to_the_gradient_of_the_group(how: str, case: Case, mode: str) -> None:
    fine, coarse, setup = hypergradient(case, per=how, mode=mode), hypergradient(case, mode=mode), case.build()
    summed = dict(fine.gradients)
    for name in case.names:
        if name not in case.clip:
            sizes = [len(g) if how == "parameter" else sum(p.numel() for p in g) for g in setup.groups]
            x = fine.gradients[name].split(sizes, dim=int(case.per_step))
            summed[name] = torch.stack([y.sum(int(case.per_step)) for y in x], int(case.per_step))
    assert_same(Result(fine.value, summed), coarse, MODES_AGREE)


def test_a_mapping_of_names() -> None:
    case = Case("mlp", "adamw")
    per = {"lr": "element", "betas": "parameter", "eps": "group"}
    for mode in ("forward", "unrolled"):
        got = hypergradient(case, per=per, mode=mode).gradients
        assert {name: tuple(x.shape) for name, x in got.items()} == {
            "lr": (57,), "betas": (4, 2), "eps": (2,), "weight_decay": (2,),
        }  # fmt: skip
        want = hypergradient(case, per="parameter").gradients
        assert torch.allclose(got["betas"], want["betas"], rtol=1e-9, atol=0)
        assert torch.allclose(torch.stack([x.sum() for x in got["lr"].split([30, 6, 18, 3])]), want["lr"], rtol=1e-9)


def test_the_docstrings_way_to_the_parameters_shapes() -> None:
    setup = Case("mlp", "momentum").build()
    params = [p for group in setup.optimizer.param_groups for p in group["params"]]
    gradient = hypergradient(Case("mlp", "momentum"), per="element").gradients["lr"]
    shaped = [x.view_as(p) for x, p in zip(gradient.split([p.numel() for p in params]), params, strict=True)]
    assert [x.shape for x in shaped] == [p.shape for p in params]
    assert not shaped[0][:2].any()  # the units that never fire
    assert shaped[0][2:].all()


# ---- implicit


@pytest.mark.parametrize("how", ["parameter", "element"])
def test_weight_decay_at_a_minimum(how: str) -> None:
    results = {}
    for mode in ("implicit", "unrolled"):
        setup = Case("ridge", "sgd").build()
        for group in setup.optimizer.param_groups:
            group["lr"] = 0.3
        results[mode] = hypergrad.hypergradient(
            setup.model, setup.optimizer, setup.loss, setup.batches[:1] * 300, setup.val_loss, "weight_decay", mode, per=how
        )  # fmt: skip
    implicit, unrolled = (results[mode].gradients["weight_decay"] for mode in ("implicit", "unrolled"))
    assert implicit.shape == ((2,) if how == "parameter" else (10,))
    assert torch.allclose(implicit, unrolled, rtol=1e-6, atol=1e-9)


def test_look_back() -> None:
    """One term of the series is the last step's share."""
    case = Case("mlp", "adamw", per_step=True, wrt=("lr",))
    setup = case.build()
    got = hypergrad.hypergradient(
        setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, "lr", "implicit", per="parameter", look_back=1
    )  # fmt: skip
    want = hypergradient(case, per="parameter").gradients["lr"][-1]
    assert torch.allclose(got.gradients["lr"], want, rtol=1e-9, atol=0)


# ---- refusals


def with_asgd(s: Setup) -> dict[str, Any]:
    return {"optimizer": torch.optim.ASGD(s.model.parameters(), lr=0.1), "wrt": "lr", "per": "parameter"}


def wide(s: Setup) -> dict[str, Any]:
    model = torch.nn.Linear(64, 65).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda *_: model.weight.square().sum()  # noqa: E731
    return {"model": model, "optimizer": sgd, "loss": loss, "val_loss": lambda: loss(), "mode": "forward",
            "wrt": "lr", "per": "element"}  # fmt: skip


BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "a word": ("momentum", {"per": "tensor"}, ValueError, "group, parameter, element"),
    "a word in a mapping": ("momentum", {"per": {"lr": "tensor"}}, ValueError, "group, parameter, element"),
    "a name that is not in wrt": ("adamw", {"wrt": "lr", "per": {"betas": "parameter"}}, ValueError, "is in wrt"),
    "a threshold": ("momentum", {"wrt": "clip_norm", "clip_norm": 1.0, "per": {"clip_norm": "parameter"}}, ValueError, "clip_n"),
    "elements of LAMB": ("lamb", {"wrt": "lr", "per": "element"}, NotImplementedError, "Lamb.*'parameter'"),
    "elements of Muon": ("muon", {"wrt": "lr", "per": "element"}, NotImplementedError, "Muon.*'parameter'"),
    "elements of NAdam": ("nadam", {"wrt": ("lr", "eps"), "per": {"eps": "element"}}, NotImplementedError, "NAdam.*'eps'"),
    "an optimizer without a rule": ("momentum", with_asgd, NotImplementedError, "ASGD.*per group"),
    "many elements forward": ("momentum", wide, NotImplementedError, "4225 tangents.*unrolled"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    optimizer, changes, error, match = BAD[name]
    s = Case("matrices" if optimizer == "muon" else "mlp", optimizer).build()
    arguments = {
        "model": s.model,
        "optimizer": s.optimizer,
        "loss": s.loss,
        "batches": s.batches,
        "val_loss": s.val_loss,
    }
    arguments |= changes(s) if callable(changes) else changes
    with pytest.raises(error, match=match):
        hypergrad.hypergradient(**arguments)
