"""The derivatives of every update rule: gradcheck with the hyperparameters as inputs, and vjp = jvpᵀ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad.optimizers.clip import Clip, ClipNorm, ClipValue
from hypergrad.optimizers.rule import Shares, UpdateRule
from hypergrad.optimizers.rules.adadelta import Adadelta
from hypergrad.optimizers.rules.adafactor import Adafactor
from hypergrad.optimizers.rules.adagrad import Adagrad
from hypergrad.optimizers.rules.adam import Adam
from hypergrad.optimizers.rules.adamax import Adamax
from hypergrad.optimizers.rules.lamb import Lamb
from hypergrad.optimizers.rules.lion import Lion
from hypergrad.optimizers.rules.muon import Muon
from hypergrad.optimizers.rules.nadam import NAdam
from hypergrad.optimizers.rules.radam import RAdam
from hypergrad.optimizers.rules.rmsprop import RMSprop
from hypergrad.optimizers.rules.sgd import SGD

TRANSPOSE = 1e-12  # relative to the sum of absolute terms: a few hundred roundings of float64
N = 7
MATRIX = (3, 4)  # of rules that are not elementwise, unless
SHAPE = {"adafactor of vectors": (5,), "adafactor clipped": (2, 3, 2), "muon tall": (4, 3)}
_POSITIVE = frozenset(
    {"sum", "exp_inf", "acc_delta", "row_var", "col_var", "variance"}
)  # slots, besides second moments

_SGD = {"lr": 0.3, "weight_decay": 0.2, "momentum": 0.7, "dampening": 0.4}
_ADAM = {"lr": 0.3, "weight_decay": 0.2, "beta1": 0.7, "beta2": 0.9, "eps": 0.05}
_RMS = {"lr": 0.3, "weight_decay": 0.2, "alpha": 0.8, "eps": 0.05, "momentum": 0.7}
_GRAD = {"lr": 0.3, "weight_decay": 0.2, "lr_decay": 0.1, "eps": 0.05}  # step reads "sum" only
_DELTA = {"lr": 0.3, "weight_decay": 0.2, "rho": 0.8, "eps": 0.05}
_NADAM = {**_ADAM, "momentum_decay": 0.3}
_NO_DECAY = {"weight_decay": 0.0}
_FACTOR = {"lr": 0.1, "weight_decay": 0.2, "beta2_decay": -0.8, "d": 1.2}
_MUON = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.7, "ns_a": 3.4445, "ns_b": -4.775, "ns_c": 2.0315}
_LION = {"lr": 0.3, "weight_decay": 0.2, "beta1": 0.7, "beta2": 0.9}


class ExactMuon(Muon):
    """Without bfloat16, which a finite difference would show."""

    def _rounded(self, x: Tensor, h: Mapping[str, float]) -> Tensor:
        wide = x.shape[0] <= x.shape[1]
        return self._exact(x, h).out if wide else self._exact(x.T, h).out.T


# rule, numbers; first steps (t = 1) and later ones (t = 4, t = 30) are all tested
RULES: dict[str, tuple[UpdateRule, dict[str, float]]] = {
    "sgd": (SGD(), _SGD),
    "sgd at 0": (SGD(), {**_SGD, "weight_decay": 0.0}),
    "momentum": (SGD(buffered=True), _SGD),
    "momentum at 0": (SGD(buffered=True), {**_SGD, "momentum": 0.0, "dampening": 0.0}),
    "nesterov": (SGD(buffered=True, nesterov=True), _SGD),
    "sgd maximize": (SGD(buffered=True, maximize=True), _SGD),
    "nesterov maximize": (SGD(buffered=True, nesterov=True, maximize=True), _SGD),
    "adam": (Adam(), _ADAM),
    "adam at 0": (Adam(), {**_ADAM, "weight_decay": 0.0}),
    "adam amsgrad": (Adam(amsgrad=True), _ADAM),
    "adam maximize": (Adam(maximize=True), _ADAM),
    "adamw": (Adam(decoupled=True), _ADAM),
    "adamw at 0": (Adam(decoupled=True), {**_ADAM, "weight_decay": 0.0}),
    "adamw amsgrad maximize": (Adam(decoupled=True, amsgrad=True, maximize=True), _ADAM),
    "rmsprop": (RMSprop(), _RMS),
    "rmsprop maximize": (RMSprop(maximize=True), _RMS),
    "rmsprop momentum": (RMSprop(buffered=True), _RMS),
    "rmsprop momentum at 0": (RMSprop(buffered=True), {**_RMS, "momentum": 0.0, "weight_decay": 0.0}),
    "centered": (RMSprop(centered=True), _RMS),
    "centered momentum": (RMSprop(centered=True, buffered=True), _RMS),
    "adagrad": (Adagrad(), _GRAD),
    "adagrad at 0": (Adagrad(), {**_GRAD, **_NO_DECAY, "lr_decay": 0.0}),
    "adagrad maximize": (Adagrad(maximize=True), _GRAD),
    "adamax": (Adamax(), _ADAM),
    "adamax at 0": (Adamax(), {**_ADAM, **_NO_DECAY}),
    "adamax maximize": (Adamax(maximize=True), _ADAM),
    "adadelta": (Adadelta(), _DELTA),
    "adadelta at 0": (Adadelta(), {**_DELTA, **_NO_DECAY}),
    "adadelta maximize": (Adadelta(maximize=True), _DELTA),
    "nadam": (NAdam(), _NADAM),
    "nadam at 0": (NAdam(), {**_NADAM, **_NO_DECAY, "momentum_decay": 0.0}),
    "nadam decoupled": (NAdam(decoupled=True), _NADAM),
    "nadam decoupled maximize": (NAdam(decoupled=True, maximize=True), _NADAM),
    "radam": (RAdam(), _ADAM),
    "radam at 0": (RAdam(), {**_ADAM, **_NO_DECAY}),
    "radam decoupled": (RAdam(decoupled=True), _ADAM),
    "radam decoupled maximize": (RAdam(decoupled=True, maximize=True), _ADAM),
    "adafactor": (Adafactor(), _FACTOR),
    "adafactor at 0": (Adafactor(), {**_FACTOR, **_NO_DECAY}),
    "adafactor large lr": (Adafactor(eps2=2.0), {**_FACTOR, "lr": 2.0}),  # lr > 1/√t, eps2 > RMS(p)
    "adafactor clipped": (Adafactor(maximize=True), {**_FACTOR, "d": 0.4}),
    "adafactor floor": (Adafactor(eps1=1.0), _FACTOR),
    "adafactor of vectors": (Adafactor(), {**_FACTOR, "d": 0.4}),
    "muon": (ExactMuon(), _MUON),
    "muon at 0": (ExactMuon(), {**_MUON, **_NO_DECAY, "momentum": 0.0}),
    "muon tall": (ExactMuon(nesterov=False, adjust="match_rms_adamw"), _MUON),
    "muon below eps": (ExactMuon(eps=50.0, adjust="spectral_unclamped"), _MUON),
    "lion": (Lion(), _LION),
    "lion at 0": (Lion(), {**_LION, **_NO_DECAY}),
    "lion fixed": (Lion("fixed"), _LION),
    "lion coupled maximize": (Lion("coupled", maximize=True), _LION),
    "lion of lion_pytorch": (Lion(first_lr=0.4, lerp=False), _LION),
    "lamb": (Lamb(), _ADAM),
    "lamb at 0": (Lamb(), {**_ADAM, **_NO_DECAY}),
    "lamb clamped": (Lamb(clamp=1.0), _ADAM),
    "lamb fixed": (Lamb("fixed", debias=False), _ADAM),
    "lamb coupled maximize": (Lamb("coupled", maximize=True), _ADAM),
    "lamb adam": (Lamb(averaging=False, adam=True), _ADAM),
}
CLIPS: dict[str, tuple[Clip, float]] = {
    "norm, active": (ClipNorm(), 1.5),
    "norm, not active": (ClipNorm(), 100.0),
    "value": (ClipValue(), 0.6),
}


def evaluated(lh: Shares) -> dict[str, Tensor]:
    return {name: x() if callable(x) else x for name, x in lh.items()}


def shapes(rule: UpdateRule, shape: tuple[int, ...]) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Of p and of the slots."""
    if rule.elementwise:
        return (N,), dict.fromkeys(rule.slots, (N,))
    return shape, rule.slot_shapes(shape)


def inputs(rule: UpdateRule, seed: int, name: str = "") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(p, g, s); second moments are large enough that centered RMSprop's variance is positive."""
    r = torch.Generator().manual_seed(seed)

    def slot(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=r, dtype=torch.float64)
        if name == "mu_product":
            return x.sigmoid()
        return 2 + x**2 if "sq" in name or name in _POSITIVE else x.tanh()

    shape, of_slots = shapes(rule, SHAPE.get(name, MATRIX))
    p, g = torch.randn(2, *shape, generator=r, dtype=torch.float64)
    return p.clone(), g.clone(), {name: slot(name, size) for name, size in of_slots.items()}


class Step(torch.autograd.Function):
    """A rule as an autograd Function of p, g, every slot and every hyperparameter (0-d)."""

    @staticmethod
    def forward(rule: UpdateRule, t: int, names: tuple[str, ...], p: Tensor, g: Tensor, *rest: Tensor) -> Any:
        s, h = Step.named(rule, t, names, rest)
        p2, s2 = rule.step(p, g, s, h)
        return p2, *(s2.get(name, s[name].clone()) for name in rule.slots)

    @staticmethod
    def named(rule: UpdateRule, t: int, names: tuple[str, ...], rest: Any) -> Any:
        n = len(rule.slots)
        h: dict[str, float] = {"t": t} | {name: float(x) for name, x in zip(names, rest[n:], strict=True)}
        return dict(zip(rule.slots, rest[:n], strict=True)), h

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.t, ctx.names, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, lp: Tensor, *ls: Tensor) -> Any:
        p, g, *rest = ctx.saved_tensors
        s, h = Step.named(ctx.rule, ctx.t, ctx.names, rest)
        lp, lg, ls2, lh = ctx.rule.vjp(p, g, s, h, lp, dict(zip(ctx.rule.slots, ls, strict=True)))
        lh = evaluated(lh)
        of_hypers = [lh[n].sum() if n in lh else torch.zeros((), dtype=p.dtype) for n in ctx.names]
        zeros = dict(zip(ctx.rule.slots, ls, strict=True))  # of size 0, where the rule leaves one out
        return None, None, None, lp, lg, *(ls2.get(n, zeros[n]) for n in ctx.rule.slots), *of_hypers

    @staticmethod
    def jvp(ctx: Any, _rule: None, _t: None, _names: None, dp: Tensor, dg: Tensor, *rest: Tensor) -> Any:
        p, g, *old = ctx.saved_tensors
        n = len(ctx.rule.slots)
        s, h = Step.named(ctx.rule, ctx.t, ctx.names, old)
        ds = {name: d[None].clone() for name, d in zip(ctx.rule.slots, rest[:n], strict=True)}
        dh = {name: d.view(1, *[1] * p.dim()) for name, d in zip(ctx.names, rest[n:], strict=True)}
        dp, out = ctx.rule.jvp(p, g, s, h, dp[None].clone(), dg[None].clone(), ds, dh)
        return dp[0], *(out.get(name, ds[name])[0] for name in ctx.rule.slots)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, on the first use of forward mode
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("t", [1, 4, 30])
@pytest.mark.parametrize("name", RULES)
def test_gradcheck(name: str, t: int, seed: int) -> None:
    rule, numbers = RULES[name]
    p, g, s = inputs(rule, seed, name)
    h = {n: torch.tensor(x, dtype=torch.float64) for n, x in numbers.items()}
    leaves = [x.requires_grad_() for x in (p, g, *s.values(), *h.values())]

    def f(*tensors: Tensor) -> Any:
        return Step.apply(rule, t, tuple(numbers), *tensors)

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_undefined_grad=False)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), t=st.sampled_from([1, 2, 10, 1000]), zeros=st.booleans())
@pytest.mark.parametrize("name", RULES)
def test_vjp_is_the_transpose_of_jvp(name: str, seed: int, t: int, zeros: bool) -> None:
    """⟨λ, J z⟩ = ⟨Jᵀ λ, z⟩ over all inputs, also where gradients and state are exactly 0."""
    rule, numbers = RULES[name]
    p, g, s = inputs(rule, seed, name)
    if zeros:
        for x in (g, *s.values()):
            x[: 3 if x.dim() == 1 else 1] = 0
    before = [x.clone() for x in (p, g, *s.values())]
    h = {"t": float(t), **numbers}
    k, r = 3, torch.Generator().manual_seed(seed + 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    z_p, z_g, z_s = randn(k, *p.shape), randn(k, *p.shape), {n: randn(k, *x.shape) for n, x in s.items()}
    z_h = {n: randn(k, *[1] * p.dim()) for n in rule.hyperparameters}
    lp, ls = randn(*p.shape), {n: randn(*x.shape) for n, x in s.items()}
    out_p, out_s = rule.jvp(p, g, s, h, z_p.clone(), z_g.clone(), {n: x.clone() for n, x in z_s.items()}, z_h)
    vp, vg, vs, vh = rule.vjp(p, g, s, h, lp.clone(), {n: x.clone() for n, x in ls.items()})
    vh = evaluated(vh)
    assert out_s.keys() == vs.keys() == {n for n, x in s.items() if x.numel()}
    left = [out_p * lp, *(out_s[n] * ls[n] for n in vs)]
    right = [
        z_p * vp,
        z_g * vg,
        *(z_s[n] * vs[n] for n in vs),
        *(z_h[n].view(k, 1) * vh[n].flatten() for n in z_h if n in vh),
    ]
    lhs, rhs = (sum(x.flatten(1).sum(1) for x in side) for side in (left, right))
    size = sum(x.abs().flatten(1).sum(1) for x in (*left, *right))
    assert bool(torch.isfinite(size).all())
    assert ((lhs - rhs).abs() <= TRANSPOSE * size).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (p, g, *s.values()), strict=True))


@pytest.mark.parametrize("name", CLIPS)
def test_clipping_is_differentiated(name: str) -> None:
    """Against autograd through torch's formula, and vjp = jvpᵀ, threshold included."""
    clip, threshold = CLIPS[name]
    sizes = [3, 4]
    g = torch.randn(N, dtype=torch.float64, requires_grad=True)
    m = torch.tensor(threshold, dtype=torch.float64, requires_grad=True)
    if isinstance(clip, ClipNorm):
        out = g * torch.clamp(m / (g.norm() + 1e-6), max=1.0)
    else:
        out = torch.maximum(torch.minimum(g, m), -m)
    lam, z, z_m = torch.randn(N).double(), torch.randn(2, N).double(), torch.randn(2, 1).double()
    of_g, of_m = torch.autograd.grad(out, (g, m), lam)
    lg, lm = clip.vjp(g.detach(), sizes, threshold, lam)
    torch.testing.assert_close(lg, of_g)
    torch.testing.assert_close(lm, of_m)
    along_z = clip.jvp(g.detach(), sizes, threshold, z, z_m)
    torch.testing.assert_close(along_z @ lam, z @ lg + (z_m * lm)[:, 0])


def test_every_exported_rule_is_in_the_table() -> None:
    from hypergrad.optimizers.registry import RULES as EXPORTED

    assert set(EXPORTED.values()) == {type(rule) for rule, _ in RULES.values()} - {ExactMuon} | {Muon}
