"""`hypergradient` on a device against the CPU in float64, and in the ways that only a GPU has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from experiments import bench_gpt
from experiments.gpu_check.jobs import MODES, RULES, Job, Rule, ce, classifier, of_rule, same, truth, two_layers
from experiments.gpu_check.rows import Check, NotRun, Place, Row
from hypergrad.differentiate.compile import compiled

LONG = 20  # steps of a stretch with several segments
COMPILED = 1e-8  # relative: a compiler may contract a·b + c
SGD, ADAMW = RULES["SGD with momentum"], RULES["AdamW"]


def agrees(off: float, with_what: str) -> Row:
    return {"detail": f"as {with_what}; largest relative difference {off:.1e}", "difference": off}


def as_on_cpu(place: Place, job: Callable[[str], Job], **options: Any) -> Row:
    """The hypergradient of a job on the device and on the CPU."""
    off = same(job(place.device).hypergradient(**options), job("cpu").hypergradient(**options))
    return agrees(off, "on CPU in float64")


def rule_and_mode(name: str, mode: str) -> Check:
    return lambda place: agrees(same(of_rule(name, place.device, **MODES[mode]), truth(name)), "on CPU in float64")


# ---- implicit


def ridge(device: str) -> Job:
    """Least squares with coupled decay: implicit differentiation is exact at its minimum, and defined everywhere."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=random, dtype=torch.float64), torch.randn(20, 1, generator=random).double()
    train, val = (x[:14].to(device), y[:14].to(device)), (x[14:].to(device), y[14:].to(device))
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double().to(device)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    return Job(model, SGD.make(model), loss, [train] * LONG, lambda: loss(model, val), ("weight_decay",))


def implicit(place: Place) -> Row:
    solved = as_on_cpu(place, ridge, mode="implicit")["difference"]
    series = as_on_cpu(place, ridge, mode="implicit", look_back=6)["difference"]
    return agrees(max(solved, series), "on CPU in float64, by conjugate gradients and by the series")


# ---- layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self, cudnn: bool) -> None:
        super().__init__()
        self.lstm, self.out, self.cudnn = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3), cudnn

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=self.cudnn):
            return self.out(self.lstm(x)[0][:, -1])


def conv_net(dropout: float = 0.0) -> nn.Module:
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(dropout))
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))


def attention(place: Place) -> Row:
    with sdpa_kernel(SDPBackend.MATH):
        return as_on_cpu(place, lambda device: classifier(Attention, ADAMW.make, (3, 4), device))


def lstm(place: Place) -> Row:
    return as_on_cpu(place, lambda device: classifier(lambda: Recurrent(False), ADAMW.make, (3, 3), device))


def cudnn_lstm(place: Place) -> Row:
    if not place.cuda:
        raise NotRun("cuDNN is on CUDA alone")
    job = classifier(lambda: Recurrent(True), ADAMW.make, (3, 3), place.device, dtype=torch.float32)
    try:
        job.hypergradient()
    except NotImplementedError as error:
        if "cudnn.flags(enabled=False)" in str(error):
            return {"detail": f"refused, with the way out: {str(error)[:120]}"}
        raise
    raise AssertionError("a cuDNN layer was differentiated twice, which torch cannot")


def channels_last(place: Place) -> Row:
    def job(device: str) -> Job:
        made = classifier(conv_net, SGD.make, (3, 8, 8), device)
        if device == "cpu" and place.cuda:
            return made  # the truth is of plain strides
        made.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made._replace(batches=[(x.to(memory_format=torch.channels_last), y) for x, y in made.batches])

    return as_on_cpu(place, job)


def dropout(place: Place) -> Row:
    """Masks are drawn again as they were, by the device's own generator, which is put back."""
    job = classifier(lambda: conv_net(0.3), SGD.make, (3, 8, 8), place.device)
    state = torch.cuda.get_rng_state if place.cuda else torch.get_rng_state
    before = state()
    forward, replayed, kept = (job.hypergradient(**o) for o in ({"mode": "forward"}, {"every": 3}, {}))
    off = max(same(replayed, forward), same(kept, forward))
    if not torch.equal(before, state()):
        raise AssertionError("the random number generator is not where it was")
    return agrees(off, "forward when replayed and when kept; the generator was put back")


# ---- several optimizers


def two_optimizers(fused: bool) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        first, second = list(model[0].parameters()), list(model[2].parameters())  # type: ignore[index]
        adam = torch.optim.AdamW(first, lr=0.02, eps=1e-2, fused=fused)
        return [adam, torch.optim.Adam(second, lr=0.02, eps=1e-2, weight_decay=0.02)]

    return make


def several(place: Place, fused: bool = False) -> Row:
    def job(device: str) -> Job:
        made = classifier(two_layers, two_optimizers(fused), (5,), device)
        made.step(made.batches[-1])  # step counters lie where each optimizer wants them
        return made

    return as_on_cpu(place, job)


# ---- snapshots and replays


def offload(place: Place, where: str) -> Row:
    job = classifier(conv_net, ADAMW.make, (3, 8, 8), place.device, steps=LONG)
    off = same(job.hypergradient(every=2, offload=where), job.hypergradient(every=2))
    return agrees(off, "with all snapshots on the device")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def tiny_gpt(device: str) -> Job:
    torch.manual_seed(0)
    model = bench_gpt.GPT(bench_gpt.TINY).to(device)
    batches = [tuple(x.to(device) for x in bench_gpt.data(bench_gpt.TINY)) for _ in range(LONG)]
    return Job(model, torch.optim.AdamW(model.parameters()), ce, batches, lambda: ce(model, batches[0]), ("lr",))  # type: ignore[arg-type]


def replay(place: Place) -> Row:
    """Replayed steps are the recorded ones to the last bit, in float32."""
    with deterministic():
        jobs = {
            "conv net": classifier(
                lambda: conv_net(0.3), SGD.make, (3, 8, 8), place.device, steps=LONG, dtype=torch.float32
            ),
            "GPT": tiny_gpt(place.device),
        }
        exactly = {name: job.hypergradient(every=4).stats["replayed_exactly"] for name, job in jobs.items()}
    if not all(exactly.values()):
        raise AssertionError(f"not replayed bit for bit: {', '.join(x for x, was in exactly.items() if not was)}")
    return {"detail": f"{' and '.join(exactly)}: bit for bit, under torch.use_deterministic_algorithms(True)"}


def compile_true(place: Place) -> Row:
    """A graph of a step and one of its adjoint against the eager code."""
    if not place.quick and not any(map(shutil.which, ("g++", "clang++", "gcc", "cc"))):
        raise NotRun("no C or C++ compiler on this machine, which inductor (CPU) and triton (CUDA) need")
    old = compiled.BACKEND
    compiled.BACKEND = "eager" if place.quick else old
    try:
        rule = Rule(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, ("lr", "weight_decay", "momentum"))
        job = classifier(two_layers, rule.make, (5,), place.device, rule.wrt)
        found = job.hypergradient(compile=True)
    finally:
        compiled.BACKEND = old
    row = agrees(same(found, job.hypergradient(), COMPILED), "the eager code")
    if not found.stats["compiled_steps"]:
        raise AssertionError("no step was played by a compiled graph")
    backend = "traced, not compiled" if place.quick else f"inductor, {found.stats['compile_seconds']:.1f} s to compile"
    return {"detail": f"{row.pop('detail')}; {backend}", **row}


FIRST = ("SGD with momentum", "AdamW")
TABLE: dict[str, Check] = {
    f"hypergradient, {rule}, {mode}": rule_and_mode(rule, mode) for rule in RULES for mode in MODES
}
IN_FRONT = {
    name: check for name, check in TABLE.items() if name.startswith(tuple(f"hypergradient, {x}," for x in FIRST))
}
REST = {name: check for name, check in TABLE.items() if name not in IN_FRONT}
REPLAYS: dict[str, Check] = {
    "replay, bit for bit": replay,
    "offload to host": partial(offload, where="host"),
    "offload to disk": partial(offload, where="disk"),
    "dropout": dropout,
}
LAYERS: dict[str, Check] = {
    "scaled_dot_product_attention under MATH": attention,
    "nn.LSTM, cuDNN off": lstm,
    "nn.LSTM, cuDNN on": cudnn_lstm,
    "conv net, channels_last": channels_last,
    "two optimizers": several,
    "two optimizers, one of them fused": partial(several, fused=True),
    "implicit": implicit,
}
COMPILE: dict[str, Check] = {"compile=True": compile_true}
