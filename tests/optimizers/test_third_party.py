"""Optimizers of other packages: found by name, their flags read, the maths that of a written-out reference."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hypergrad.optimizers import registry
from hypergrad.optimizers.rules.lion import Lion
from hypergrad.optimizers.transition import Transition
from tests import references
from tests.cases import OPTIMIZERS, Case
from tests.optimizers.live_optimizers import gradients, make, parameters, sometimes, step_both
from tests.oracle import assert_matches, hypergradient
from tests.problems import Setup

STEPS = 50
ROUNDING = 1e-12  # relative, of float64 over those steps: operations are ordered otherwise

_NUMBERS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
FLAGS = [{}, {"maximize": True}, {"fixed_decay": True}, {"weight_decouple": False}]
OF_LAMB = [{"grad_averaging": False}, {"adam": True}, {"adam_debias": True}]
REFERENCES = [(cls, f) for cls in (references.Lion, references.Lamb) for f in FLAGS] + [
    (references.Lamb, f) for f in OF_LAMB
]


@pytest.mark.parametrize(("cls", "flags"), REFERENCES)
def test_rule_is_the_reference(cls: Any, flags: dict[str, Any]) -> None:
    params = parameters(torch.float64)
    optimizer = make(cls, _NUMBERS | flags, params)
    transition = Transition([optimizer], frozenset())
    state = transition.read()
    for t in range(STEPS):
        state = step_both(optimizer, transition, state, gradients(params, t, sometimes))
    want = transition.flatten(params)
    assert (state.theta - want).abs().max() <= ROUNDING * want.abs().max()


REFUSED: dict[str, tuple[type, dict[str, Any], type[Exception], str]] = {
    "use_gc": (references.Lion, {"use_gc": True}, NotImplementedError, "use_gc=True.*leave"),
    "cautious": (references.Lion, {"cautious": True}, NotImplementedError, "cautious=True.*leave"),
    "adanorm": (references.Lion, {"adanorm": True}, NotImplementedError, "adanorm=True.*leave"),
    "lion at a jump": (references.Lion, {"weight_decouple": False}, ValueError, "weight_decouple=True"),
    "rectify": (references.Lamb, {"rectify": True}, NotImplementedError, "rectify=True.*leave"),
    "lamb adanorm": (references.Lamb, {"adanorm": True}, NotImplementedError, "adanorm=True.*leave"),
    "pre_norm": (references.Lamb, {"pre_norm": True}, NotImplementedError, "pre_norm=True.*clip_norm="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_without_a_rule_are_refused(name: str) -> None:
    cls, flags, error, match = REFUSED[name]
    optimizer = make(cls, {"lr": 0.1, **flags}, parameters(torch.float32))
    with pytest.raises(error, match=match):
        Transition([optimizer], frozenset({"lr", "weight_decay"}))


def test_a_triton_kernel_is_refused() -> None:
    group = {"lr": 0.1, "decoupled_wd": False, "_init_lr": 0.1, "update_fn": types.FunctionType(gradients.__code__, {})}
    with pytest.raises(NotImplementedError, match="use_triton=False"):
        Lion.from_group(group, frozenset())


def test_a_class_is_found_by_name_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(references.Lion):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            return super().step()

    optimizer = Elsewhere(parameters(torch.float32))
    monkeypatch.setitem(registry.RULES, "some_package.optim.Lion", Lion)
    assert registry.rule_of(optimizer) is None
    module = types.ModuleType("some_package.optim")
    monkeypatch.setattr(module, "Lion", Elsewhere, raising=False)
    monkeypatch.setitem(sys.modules, "some_package.optim", module)
    assert registry.rule_of(optimizer) is Lion


def test_a_subclass_made_before_its_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch puts its hooked step into the class that is instantiated first."""

    class Base(references.Lion):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            return super().step()

    class Derived(Base):
        """Inherits step."""

    class Overrides(Base):
        @functools.wraps(Base.step)
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            return super().step()

    monkeypatch.setitem(registry.RULES, Base, Lion)
    assert registry.rule_of(Derived(parameters(torch.float32))) is Lion
    assert registry.rule_of(Overrides(parameters(torch.float32))) is None
    assert registry.rule_of(Base(parameters(torch.float32))) is Lion
    assert registry.rule_of(Overrides(parameters(torch.float32))) is None


@pytest.mark.slow
def test_no_other_package_is_imported() -> None:
    code = "import sys, hypergrad; print([m for m in ('pytorch_optimizer', 'lion_pytorch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_lion_is_piecewise_constant_in_its_betas() -> None:
    """Their hypergradient is 0, and so is that of a coupled decay, while that of lr is not."""
    for optimizer in ("lion", "lion_coupled"):
        result = hypergradient(Case("mlp", optimizer), mode="forward")
        assert not result.gradients["betas"].any()
        assert result.gradients["lr"].all()
        assert bool(result.gradients["weight_decay"].any()) == (optimizer == "lion")


@dataclass(frozen=True)
class FromZeros(Case):
    """A bias starts from zeros: its first trust ratio is 1."""

    def build(self) -> Setup:
        setup = super().build()
        with torch.no_grad():
            setup.model[2].bias.zero_()
        return setup


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_lamb_where_the_trust_ratio_jumps(mode: str) -> None:
    case = FromZeros("mlp", "lamb")
    assert_matches(hypergradient(case, mode=mode), case)


def test_rows_of_other_packages_have_rows_of_references() -> None:
    named = {row.cls for row in OPTIMIZERS.values() if isinstance(row.cls, str)}
    assert named == {key for key in registry.RULES if isinstance(key, str)}
