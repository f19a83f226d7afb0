"""Schedules in `hypergradient`: their tensors' gradients against the stock loop, mode against mode, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import Result, schedules
from tests.cases import Case
from tests.oracle import MODES_AGREE, assert_same
from tests.problems import STEPS, Setup
from tests.stock import Run, assert_right
from tests.tiers import slow_but

H = dict[str, Tensor]


def x(t: int) -> float:
    """Normalised time, off the knots."""
    return (t + 0.5) / STEPS


def knots_lr(t: int, h: H) -> Tensor:
    return schedules.knots(x(t), h["v"], h["at"])


def warm_lr(t: int, h: H) -> Tensor:
    return schedules.warmup_decay(x(t), h["peak"], h["warmup"], h["floor"], h["power"])


def cosine_lr(t: int, h: H) -> Tensor:
    return schedules.warmup_decay(x(t), h["peak"], h["warmup"], power="cosine")


KNOTS = {"v": [0.02, 0.2, 0.05], "at": [0.0, 0.37, 1.0]}
WARM = {"peak": 0.2, "warmup": 0.3, "floor": 0.01, "power": 1.7}

RUNS: dict[str, Run] = {
    "knots in values and times": Run(Case("mlp", "momentum"), ("v", "at"), KNOTS, {"lr": knots_lr}),
    "knots, AdamW": Run(
        Case("mlp", "adamw"), ("v",), {"v": [0.01, 0.04, 0.02]}, {"lr": lambda t, h: schedules.knots(x(t), h["v"])}
    ),
    "warm-up, peak, floor, power": Run(Case("mlp", "momentum"), tuple(WARM), WARM, {"lr": warm_lr}),
    "cosine": Run(Case("mlp", "adamw"), ("peak", "warmup"), {"peak": 0.03, "warmup": 0.3}, {"lr": cosine_lr}),
    "a LambdaLR-like function": Run(
        Case("dropout", "adamw"), ("gamma", "lr"), {"gamma": 0.8}, {"lr": lambda t, h: 0.03 * h["gamma"] ** t}
    ),
    "one for each group": Run(Case("mlp", "momentum"), ("lr0", "weight_decay"), {"lr0": [0.2]},
        {"lr": lambda t, h: [h["lr0"][0] / (1 + t), 0.05]}),
    "a tensor of groups": Run(Case("mlp", "momentum"), ("m",), {"m": [0.8, 0.6]},
        {"momentum": lambda t, h: h["m"] * (1 - 0.02 * t)}),
    "a pair": Run(Case("mlp", "adamw"), ("b",), {"b": 0.8}, {"betas": lambda t, h: (h["b"] + 0.01 * t, 0.95)}),
    "a tensor pair": Run(Case("dropout", "adam"), ("b",), {"b": [0.8, 0.9]}, {"betas": lambda t, h: h["b"]}),
    "pairs for each group": Run(Case("mlp", "adamw"), ("b",), {"b": [0.8, 0.9]},
        {"betas": lambda t, h: [(h["b"][0], 0.9), (0.7, h["b"][1])]}),
    "weight decay from 0": Run(Case("mlp", "adamw"), ("rate",), {"rate": 0.05}, {"weight_decay": lambda t, h: t * h["rate"]}),
    "clipping": Run(Case("mlp", "momentum", clip_norm=0.245), ("c", "clip_norm"), {"c": 0.245},
        {"clip_norm": lambda t, h: h["c"] * 0.98**t}),
    "several at once": Run(Case("mlp", "adamw", clip_norm=0.245), ("s", "b", "lr", "eps"), {"s": 0.9, "b": 0.8},
        {"lr": lambda t, h: 0.03 * h["s"] ** t, "weight_decay": lambda t, h: 0.1 * h["s"], "betas": lambda t, h: (h["b"], 0.9),
         "clip_norm": lambda t, h: 0.25 * h["s"]}),
    "in the loss and in a schedule": Run(Case("loss_hypers", "momentum"), ("penalty", "smoothing", "lr"), {},
        {"weight_decay": lambda t, h: 0.02 + h["penalty"] * (1 + t), "lr": lambda t, h: 0.2 - h["smoothing"]}),
    "several validations": Run(Case("mlp", "momentum", val_steps=(0, 2, 4)), ("v", "at"), KNOTS, {"lr": knots_lr}),
    "per step": Run(Case("mlp", "momentum"), ("v", "lr"), {"v": [0.02, 0.2]},
        {"lr": lambda t, h: schedules.knots(x(t), h["v"])}, per_step=True),
    "per step, AdamW": Run(Case("loss_hypers", "adamw"), ("penalty", "betas"), {},
        {"lr": lambda t, h: 0.02 + h["penalty"], "betas": lambda t, h: (0.8, 0.9)}, per_step=True),
    "numbers alone": Run(Case("mlp", "adamw"), ("lr", "weight_decay"), {}, {"lr": lambda t, h: 0.04 * 0.8**t}),
    "LAMB": Run(Case("mlp", "lamb"), ("v",), {"v": [0.01, 0.04]}, {"lr": lambda t, h: schedules.knots(x(t), h["v"])}),
    "Muon": Run(Case("matrices", "muon"), ("v",), {"v": [0.02, 0.06]}, {"lr": lambda t, h: schedules.knots(x(t), h["v"])}),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(RUNS, *(name for name in RUNS if name not in ("Muon", "per step, AdamW"))))
def test_matches_the_stock_loop_and_forward(name: str) -> None:
    run = RUNS[name]
    unrolled = run.hypergradient(mode="unrolled")
    assert_right(run, unrolled)
    assert_same(run.hypergradient(mode="forward"), unrolled, MODES_AGREE)
    assert_same(run.hypergradient(mode="unrolled", every=2), unrolled, MODES_AGREE)
    assert not unrolled.stats["warnings"]


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
@pytest.mark.parametrize("name", ["per step", "per step, AdamW"])
def test_per_step_sums_to_the_shared_gradient(name: str, mode: str) -> None:
    run = RUNS[name]
    shared = Run(run.case, run.wrt, run.hypers, run.schedules).hypergradient(mode=mode)
    steps = run.hypergradient(mode=mode)
    assert_same(Result(steps.value, {name: x.sum(0) for name, x in steps.gradients.items()}), shared)


def test_an_optimizer_without_a_rule() -> None:
    """Through the fallback: its own step, with the scheduled number in its param groups."""
    setup = Case("mlp", "momentum").build()
    results = []
    for mode in ("forward", "unrolled"):
        optimizer = torch.optim.ASGD(setup.model.parameters(), lr=0.1)
        results.append(hypergrad.hypergradient(
            setup.model, optimizer, setup.loss, setup.batches, setup.val_loss, "v", mode, hypers={"v": torch.tensor([0.1, 0.3])},
            schedules={"lr": lambda t, h: schedules.knots(x(t), h["v"])},
        ))  # fmt: skip
    assert_same(results[0], results[1], 1e-6)  # knots in float32
    asgd = hypergrad.hypergradient(
        setup.model, torch.optim.ASGD(setup.model.parameters(), lr=0.1), setup.loss, setup.batches, setup.val_loss, "lr",
        per_step=True, schedules={"lr": lambda t, h: float(schedules.knots(x(t), [0.1, 0.3]))},
    )  # fmt: skip
    want = torch.stack([(1 - x(t)) * asgd.gradients["lr"][t].sum() for t in range(STEPS)]).sum()
    assert results[1].gradients["v"][0] == pytest.approx(float(want), rel=1e-6)


# ---- what a loss is called with, and what nothing depends on


def signature_cases() -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """A loss, and whether it is given hypers."""
    return {
        "two": (lambda model, batch: seen(model, batch, None), False),
        "three": (lambda model, batch, h: seen(model, batch, h), True),
        "None by default": (lambda model, batch, h=None: seen(model, batch, h), True),
        "an option of the user's": (lambda model, batch, scale=1.0: seen(model, batch, None if scale == 1.0 else scale), False),
        "args": (lambda *args: seen(*args), True),
    }  # fmt: skip


SEEN: list[Any] = []


def seen(model: torch.nn.Module, batch: Any, h: Any = None) -> Tensor:
    SEEN.append(h)
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", signature_cases())
def test_what_the_loss_is_called_with(name: str) -> None:
    loss, given = signature_cases()[name]
    SEEN.clear()
    setup = Case("mlp", "momentum").build()
    result = hypergrad.hypergradient(
        setup.model, setup.optimizer, loss, setup.batches, setup.val_loss, "c", hypers={"c": 0.1},
        schedules={"lr": lambda t, h: h["c"]},
    )  # fmt: skip
    assert all((h is not None) == given for h in SEEN)
    assert result.gradients["c"] != 0


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_key_that_nothing_reads(mode: str) -> None:
    run = Run(Case("mlp", "momentum"), ("c", "idle"), {"c": 0.1, "idle": [1.0, 2.0]}, {"lr": lambda t, h: h["c"]})
    with pytest.raises(ValueError, match=r"nothing reads hypers\['idle'\]:"):
        run.hypergradient(mode=mode)


# ---- implicit


def ridge_call(schedules: dict[str, Any], wrt: Any, **options: Any) -> Result:
    setup = Case("ridge", "sgd").build()
    batch = setup.batches[0]
    for group in setup.optimizer.param_groups:
        group["lr"] = 0.3
    return hypergrad.hypergradient(
        setup.model, setup.optimizer, setup.loss, [batch] * 300, setup.val_loss, wrt, hypers={"w": torch.tensor(0.1).double()},
        schedules=schedules, **options,
    )  # fmt: skip


def test_a_schedule_of_weight_decay_at_a_minimum() -> None:
    schedules = {"weight_decay": lambda t, h: 2 * h["w"], "lr": lambda t, h: 0.3}
    implicit, unrolled = (ridge_call(schedules, "w", mode=mode) for mode in ("implicit", "unrolled"))
    assert implicit.gradients["w"] == pytest.approx(float(unrolled.gradients["w"]), rel=1e-6)
    assert implicit.initial is None


def test_a_schedule_of_lr_does_not_move_a_minimum() -> None:
    with pytest.raises(NotImplementedError, match="schedule of 'lr'"):
        ridge_call({"lr": lambda t, h: h["w"]}, "w", mode="implicit")


def test_look_back_through_a_schedule() -> None:
    """One term of the series is the last step's share."""
    options = {"schedules": {"lr": lambda t, h: h["w"] * (1 + t / 300)}}
    got = ridge_call(**options, wrt="w", mode="implicit", look_back=1).gradients["w"]
    want = ridge_call(**options, wrt="w", mode="unrolled", per_step=True).gradients["w"][-1]
    assert got == pytest.approx(float(want), rel=1e-9)


# ---- refusals


def at_step(t: int, bad: Any, good: Any = 0.1) -> Callable[[int, H], Any]:
    return lambda s, h: bad if s == t else good


def counting() -> Callable[[int, H], Tensor]:
    calls = count()
    return lambda t, h: h["c"] / (1 + next(calls))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": ({"schedules": {"lr": at_step(3, float("nan"))}}, ValueError, "not finite at step 3"),
    "infinite": ({"schedules": {"lr": at_step(5, [0.1, float("inf")])}}, ValueError, "not finite at step 5"),
    "no function": ({"schedules": {"lr": 0.1}}, TypeError, r"f\(step, hypers\)"),
    "no number": ({"schedules": {"lr": at_step(2, "0.1x")}}, TypeError, "step 2"),
    "None": ({"schedules": {"lr": at_step(0, None)}}, TypeError, "NoneType at step 0"),
    "three groups": ({"schedules": {"lr": at_step(1, [0.1] * 3)}}, ValueError, r"shape \(3,\) at step 1"),
    "unknown name": ({"schedules": {"learning_rate": at_step(1, 0.1)}}, ValueError, r"there are \['lr'"),
    "another optimizer's name": ({"schedules": {"betas": at_step(1, 0.1)}}, ValueError, "'betas'"),
    "clipping that is off": ({"schedules": {"clip_norm": at_step(1, 0.1)}}, ValueError, "pass clip_norm="),
    "an average that is off": ({"schedules": {"ema": at_step(1, 0.1)}}, ValueError, "pass ema="),
    "a threshold of 0": ({"schedules": {"clip_norm": at_step(4, 0.0)}, "clip_norm": 1.0}, ValueError, "positive"),
    "a decay above 1": ({"schedules": {"ema": at_step(4, 1.5)}, "ema": 0.9}, ValueError, "step 4"),
    "momentum 0 once": ({"schedules": {"momentum": at_step(2, 0.0, 0.9)}}, ValueError, "exactly 0 at step 2"),
    "a counter": ({"schedules": {"lr": counting()}}, ValueError, "another value at step"),
    "wrt of an average that is off": ({"wrt": "ema"}, ValueError, "pass ema="),
}


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
@pytest.mark.parametrize("name", BAD)
def test_bad_schedules(name: str, mode: str) -> None:
    changes, error, match = BAD[name]
    s: Setup = Case("mlp", "momentum").build()
    before, rng = [p.clone() for p in s.model.parameters()], torch.get_rng_state()
    with pytest.raises(error, match=match):
        hypergrad.hypergradient(
            s.model, s.optimizer, s.loss, s.batches, s.val_loss, **({"wrt": "c", "hypers": {"c": 0.1}, "mode": mode} | changes)
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, s.model.parameters(), strict=True))
    assert not s.optimizer.state
    assert torch.equal(rng, torch.get_rng_state())


def test_flags_are_checked_at_every_step() -> None:
    """Nesterov is discontinuous in momentum at 0; the schedule gets there at step 2."""
    s = Case("mlp", "nesterov").build()
    call = (s.model, s.optimizer, s.loss, s.batches, s.val_loss, "lr")
    with pytest.raises(ValueError, match=r"step 2, param group 0: SGD is discontinuous"):
        hypergrad.hypergradient(*call, schedules={"momentum": at_step(2, 0.0, 0.9)})


# ---- shapes


BAD_SHAPES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "one knot": (lambda: schedules.knots(0.1, [1.0]), "two values"),
    "a scalar": (lambda: schedules.knots(0.1, 1.0), "two values"),
    "times of another length": (lambda: schedules.knots(0.1, [1.0, 2.0], [0.0, 0.5, 1.0]), "one time for each"),
    "times that fall": (lambda: schedules.knots(0.1, [1.0, 2.0], [1.0, 0.0]), "increase"),
    "x in steps": (lambda: schedules.warmup_decay(3, 1.0, 0.1), "normalised time"),
    "a warm-up in steps": (lambda: schedules.warmup_decay(0.3, 1.0, 10), "share of the run"),
    "a power of 0": (lambda: schedules.warmup_decay(0.3, 1.0, 0.1, power=0.0), "above 0"),
    "a word": (lambda: schedules.warmup_decay(0.3, 1.0, 0.1, power="linear"), "cosine"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes(name: str) -> None:
    call, match = BAD_SHAPES[name]
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("at", [0.0, 0.05, 0.3, 0.31, 0.7, 1.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, "cosine"])
def test_warmup_decay_by_gradcheck(at: float, power: Any) -> None:
    point = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.2, 0.1)]
    if power == "cosine":
        assert torch.autograd.gradcheck(lambda p, w, f: schedules.warmup_decay(at, p, w, f, power), point)
        return
    point.append(torch.tensor(power, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda p, w, f, q: schedules.warmup_decay(at, p, w, f, q), point)


def test_a_warm_up_of_length_0_has_finite_slopes() -> None:
    w = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    y = schedules.warmup_decay(torch.tensor([0.0, 0.5, 1.0]), 2.0, w)
    assert y.tolist() == [2.0, 1.0, 0.0]
    assert torch.autograd.grad(y.sum(), w)[0] == pytest.approx(2 * 1.5)  # Σ peak (1 − x)


@pytest.mark.parametrize("at", [-0.5, 0.1, 0.4, 0.9, 1.5])
def test_knots_by_gradcheck(at: float) -> None:
    v = torch.tensor([[0.3, 1.0], [0.1, 2.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, t: schedules.knots(at, v, t), (v, t))


def test_knots_of_several_times_at_once() -> None:
    times = torch.tensor([[0.0, 0.25], [0.75, 1.0]], dtype=torch.float64)
    assert schedules.knots(times, [0.0, 1.0, 0.0]).tolist() == [[0.0, 0.5], [0.5, 0.0]]
    assert schedules.knots(times, [[0.0, 1.0], [1.0, 0.0]]).shape == (2, 2, 2)
