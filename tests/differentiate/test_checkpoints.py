"""The unrolled mode's memory: graphs that are kept, replayed states, states on disk; warnings about replays and chaos."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from hypergrad.differentiate import offload
from tests.problems import DEVICE, ce, randint, randn

STEPS = 23
WAYS: dict[str, dict[str, Any]] = {
    "graphs kept": {},
    "memory for two graphs of a segment": {"graph_memory": 10_000},
    "memory for those of a segment": {"graph_memory": 50_000},
    "no graphs": {"graph_memory": 0},
    "every step": {"every": 1},
    "every fifth step": {"every": 5},
    "one checkpoint": {"every": STEPS},
    "disk": {"offload": "disk"},
    "disk, every second step": {"offload": "disk", "every": 2},
    "disk, every step": {"offload": "disk", "every": 1},
    "host": {"offload": "host", "every": 4},
}


def setup(model: nn.Module | None = None, steps: int = STEPS) -> dict[str, Any]:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    model = model.double().to(DEVICE)
    held_out = randn(8, 5, seed=99), randint(3, 8, seed=98)

    def val_loss() -> Tensor:
        model.eval()
        loss = ce(model, held_out)
        model.train()
        return loss

    batches = [(randn(8, 5, seed=i), randint(3, 8, seed=100 + i)) for i in range(steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    return {"model": model, "optimizer": optimizer, "loss": ce, "batches": batches, "val_loss": val_loss}


@pytest.fixture(scope="module")
def tangents() -> hypergrad.Result:
    return hypergrad.hypergradient(**setup(), mode="forward")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(way: str, tangents: hypergrad.Result, tmp_path: Path) -> None:
    options = WAYS[way]
    if options.get("offload") == "disk":
        options = options | {"offload": tmp_path}
    result = hypergrad.hypergradient(**setup(), **options)
    assert float(result.value) == pytest.approx(float(tangents.value), rel=1e-12)
    for name, x in result.gradients.items():
        assert torch.allclose(x, tangents.gradients[name], rtol=1e-9, atol=0)
    assert result.stats["replayed_exactly"] and result.stats["replay_mismatch"] == 0
    assert list(tmp_path.iterdir()) == []


def test_graphs_that_are_kept_spare_gradients() -> None:
    gradients = {way: hypergrad.hypergradient(**setup(), **WAYS[way]).stats["gradient_evaluations"] for way in WAYS}
    assert gradients["graphs kept"] == STEPS
    assert gradients["every step"] == gradients["disk, every step"] == 2 * STEPS
    segments = 6  # of 4 steps, the last of 3: each is replayed but for its last step
    assert gradients["no graphs"] == 3 * STEPS - segments
    assert gradients["memory for two graphs of a segment"] == 3 * STEPS - segments - 2 * segments
    assert gradients["memory for those of a segment"] == gradients["disk"] == 2 * STEPS


def test_graphs_whose_gradients_are_not_torchs_to_the_last_bit_are_not_kept_in_replays() -> None:
    def result(**how: Any) -> hypergrad.Result:
        return hypergrad.hypergradient(**setup(nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3))), **how)

    little, none = result(graph_memory=20_000), result(graph_memory=0)
    assert little.stats["replayed_exactly"] and little.stats["gradient_evaluations"] == 63
    assert torch.equal(little.gradients["lr"], none.gradients["lr"])


def test_checkpoints_leave_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    most, written = 0, 0
    away = offload.OffloadedStack._away

    def counted(self: Any, *args: Any) -> Any:
        nonlocal most, written
        most, written = max(most, len(self.on_device)), written + 1
        return away(self, *args)

    monkeypatch.setattr(offload.OffloadedStack, "_away", counted)
    hypergrad.hypergradient(**setup(), offload=tmp_path, every=1)
    assert written == STEPS + 1 - offload.ON_DEVICE
    assert most <= offload.ON_DEVICE + 1


@pytest.mark.parametrize(("free", "segments"), [(1e9, 12), (35_000, 8), (22_000, 6)])
def test_checkpoints_on_disk_leave_half_of_the_disk_space_free(
    free: float, segments: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A state is 3 × 72 numbers of 8 bytes (AdamW), and 13 of BatchNorm's: 23 of them are 42 kB."""
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with offload.Stacks(tmp_path, torch.device("cpu")) as stacks:
        every = stacks.default_every(STEPS, 8 * (3 * 72 + 13))
    assert -(-STEPS // every) == segments


def test_checkpoints_that_do_not_fit_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda _: SimpleNamespace(free=15_000))
    run = setup()
    before = [x.clone() for x in run["model"].state_dict().values()]
    with pytest.raises(ValueError, match="more than half of what is free"):
        hypergrad.hypergradient(**run | {"loss": pytest.fail}, offload=tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(before, run["model"].state_dict().values(), strict=True))
    assert list(tmp_path.iterdir()) == []


class InPlace(nn.Module):
    """Its graph keeps a buffer that the next step writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.9)
        return self.linear(x) ** 2 * self.scale


@pytest.mark.filterwarnings("ignore:training changes the buffers")
def test_a_graph_that_is_written_over_is_played_again() -> None:
    ways: tuple[dict[str, Any], ...] = {}, {"every": 2}, {"offload": "disk"}
    kept, replayed, disk = (hypergrad.hypergradient(**setup(InPlace(), 5), **how) for how in ways)
    assert torch.equal(kept.gradients["lr"], replayed.gradients["lr"])
    assert torch.equal(disk.gradients["lr"], replayed.gradients["lr"])
    assert kept.stats["gradient_evaluations"] == 10
    assert disk.stats["gradient_evaluations"] == replayed.stats["gradient_evaluations"] == 12


def test_batches_may_be_made_when_they_are_asked_for(tangents: hypergrad.Result) -> None:
    class Lazy:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
            self.asked.append(t)
            return randn(8, 5, seed=t), randint(3, 8, seed=100 + t)

    batches = Lazy()
    result = hypergrad.hypergradient(**setup() | {"batches": batches}, every=5)
    assert torch.allclose(result.gradients["lr"], tangents.gradients["lr"], rtol=1e-9)
    assert batches.asked.count(0) == 3


def test_a_replay_that_differs_in_its_last_bits_is_said() -> None:
    source = random.Random(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return ce(model, batch) * (1 + 1e-9 * source.random())

    stats = hypergrad.hypergradient(**setup() | {"loss": loss}, every=5).stats
    assert not stats["replayed_exactly"]
    assert 0 < stats["replay_mismatch"] < 1e-6
    if DEVICE == "cpu":
        assert any("not deterministic" in sentence for sentence in stats["warnings"])


def test_nan_in_a_replay_alone_is_an_error() -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return ce(model, batch) * (float("nan") if calls == STEPS + 2 else 1.0)

    with pytest.raises(ValueError, match="is not deterministic"):
        hypergrad.hypergradient(**setup() | {"loss": loss}, every=5)


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_chaos_is_said_in_a_sentence(mode: str) -> None:
    """SGD on θ²/2 with lr 3: θ ← −2 θ, tangent and adjoint double at every step."""
    model = nn.Linear(1, 1, bias=False).double().to(DEVICE)
    nn.init.constant_(model.weight, 1.0)

    def loss(model: Any, batch: Any = None) -> Tensor:
        return (model.weight**2).sum() / 2

    sgd = torch.optim.SGD(model.parameters(), lr=3.0)
    wild = hypergrad.hypergradient(model, sgd, loss, [None] * 30, lambda: loss(model), "lr", mode=mode).stats
    assert wild["growth_rate"] == pytest.approx(0.693, abs=0.15 if mode == "forward" else 1e-2)  # ln 2; t 2ᵗ forward
    assert any("chaotic" in s and "smaller lr" in s for s in wild["warnings"])
    sgd.param_groups[0]["lr"] = 0.1
    tame = hypergrad.hypergradient(model, sgd, loss, [None] * 30, lambda: loss(model), "lr", mode=mode).stats
    assert tame["warnings"] == [] and tame["nonfinite_share"] == 0
    sgd.param_groups[0]["lr"] = 1e40
    lost = hypergrad.hypergradient(model, sgd, loss, [None] * 30, lambda: loss(model), "lr", mode=mode).stats
    assert lost["nonfinite_share"] > 0.5 and any("overflowed" in s for s in lost["warnings"])


SWALLOWS = ("gc_callback", "__del__", "remove")  # of hypothesis, of objects, of weak references (Dynamo has its own)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"offload": "disk"}, {"mode": "forward"}], ids=str)
def test_interrupted_by_a_signal_the_model_is_as_it_was(options: dict[str, Any]) -> None:
    def interrupt(_: int, frame: Any) -> None:
        while frame is not None:
            if frame.f_code.co_name in SWALLOWS or "_dynamo" in frame.f_code.co_filename:
                # Python would drop the exception there: once more, a little later
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    work = setup(steps=2000)
    before = {name: x.clone() for name, x in work["model"].state_dict().items()}
    rng, old = torch.get_rng_state(), signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        with pytest.raises(KeyboardInterrupt):
            hypergrad.hypergradient(**work, **options)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert all(torch.equal(x, before[name]) for name, x in work["model"].state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and not work["optimizer"].state
    assert all(p.grad is None for p in work["model"].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number"),
        ({"graph_memory": -1}, "graph_memory must be a number of bytes"),
        ({"graph_memory": True}, "graph_memory must be"),
        ({"offload": "/no/such/folder"}, "offload: there is no folder '/no/such/folder'"),
        ({"offload": 3}, "offload must be"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        hypergrad.hypergradient(**setup(), **options)


def test_a_full_disk_is_an_error_and_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    work = setup()
    before = cross_entropy(work["model"].eval()(work["batches"][0][0]), work["batches"][0][1])
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        hypergrad.hypergradient(**work, offload="disk", every=1)
    assert torch.equal(before, cross_entropy(work["model"].eval()(work["batches"][0][0]), work["batches"][0][1]))
