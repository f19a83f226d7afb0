"""The online tuner in a live loop on a device: against the CPU in float64, and under the ways GPUs are used."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets
from experiments.gpu_check.exact import agrees, deterministic, two_optimizers
from experiments.gpu_check.jobs import RULES, SAME, Job, classifier, two_layers
from experiments.gpu_check.rows import Check, NotRun, Place, Row

STEPS = 40
ONLINE = 1e-6  # relative: rounding, through 40 steps of a loop that decides by what it measures

# How a loop is run: automatic mixed precision, a GradScaler, torch's several implementations of a step.
LOOPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 autocast": {"autocast": torch.bfloat16},
    "fp16 autocast, GradScaler": {"autocast": torch.float16, "scaler": True},
    "fused AdamW": {"fused": True},
    "capturable AdamW": {"capturable": True},
    "capturable AdamW, lr a tensor": {"capturable": True, "tensor_lr": True},
    "foreach AdamW": {"foreach": True},
    "bf16 autocast, fused AdamW": {"autocast": torch.bfloat16, "fused": True},
    "fp16 autocast, GradScaler, fused AdamW": {"autocast": torch.float16, "scaler": True, "fused": True},
}


def live_loop(
    place: Place,
    autocast: torch.dtype | None = None,
    scaler: bool = False,
    tensor_lr: bool = False,
    **implementation: Any,
) -> Row:
    """A user's loop; raises where training or tuning did not happen."""
    if implementation.get("capturable") and not place.cuda:
        raise NotRun("capturable=True is for CUDA alone")
    device, steps = place.device, 60 if place.quick else 100
    data = datasets.clusters().to(device)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    lr = torch.tensor(1e-4, device=device) if tensor_lr else 1e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, **implementation)
    grad_scaler = torch.amp.GradScaler(device) if scaler else None

    def loss_of(split: datasets.Split) -> Tensor:
        with torch.autocast(torch.device(device).type, autocast or torch.bfloat16, enabled=autocast is not None):
            return cross_entropy(model(split.x), split.y)

    tuner = hypergrad.Tuner(
        model, optimizer, lambda: loss_of(data.val), tune=("lr", "weight_decay"), total_steps=steps, scaler=grad_scaler
    )
    before = loss_of(data.val).item()
    for _ in range(steps):
        loss = loss_of(data.train)
        optimizer.zero_grad()
        if grad_scaler:
            tuner.backward(grad_scaler.scale(loss))
            grad_scaler.step(optimizer)
            grad_scaler.update()
        else:
            tuner.backward(loss)
            optimizer.step()
    after, tuned = loss_of(data.val).item(), tuner.values["lr"].item()
    unknown = tuner.stats["changed_gradients"] + tuner.stats["plain_steps"]
    tuner.close()
    line = f"validation loss {before:.3f} to {after:.3f}, lr 1e-4 to {tuned:.2g}"
    if not (math.isfinite(after) and after < before / 2 and abs(tuned / 1e-4 - 1) > 1e-3):
        raise AssertionError(line)
    if unknown:
        raise AssertionError(f"{line}; {unknown} steps whose gradients the tuner did not recognise")
    return {"detail": line, "val_loss_before": before, "val_loss_after": after, "lr": tuned}


# ---- against the CPU


def tuned(job: Job, first: int = 0, last: int = STEPS, tuner: hypergrad.Tuner | None = None, **options: Any) -> Any:
    """Steps first … last of a loop; the tuner."""
    optimizers = job.optimizer if isinstance(job.optimizer, list) else [job.optimizer]
    tuner = tuner or make_tuner(job, **options)
    for batch in job.batches[first:last]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        tuner.backward(job.loss(job.model, batch))
        for optimizer in optimizers:
            optimizer.step()
    return tuner


def make_tuner(job: Job, **options: Any) -> hypergrad.Tuner:
    options = {"cost": None, **options}  # no clock: what is compared is to be the same
    return hypergrad.Tuner(job.model, job.optimizer, job.val_loss, job.wrt, total_steps=STEPS, every=4, **options)


def furthest(found: hypergrad.Tuner, true: hypergrad.Tuner, tolerance: float) -> float:
    """The largest relative difference of tuned values, which is an error beyond the tolerance."""
    off = max(float(((found.values[name] - x) / x).abs().max()) for name, x in true.values.items())
    if not off <= tolerance:
        raise AssertionError(f"tuned values differ by {off:.1e}, relative; {tolerance:.0e} is allowed")
    if not all(tuner.stats["hyper_steps"] for tuner in (found, true)):
        raise AssertionError("there was no hyperparameter step")
    return off


def online(place: Place, make: Callable[[nn.Module], Any], **options: Any) -> Row:
    jobs = (classifier(two_layers, make, (5,), device, steps=STEPS) for device in (place.device, "cpu"))
    found, true = (tuned(job, **options) for job in jobs)
    return agrees(furthest(found, true, ONLINE), "on CPU in float64, lr and weight decay after 40 steps")


def resume(place: Place) -> Row:
    """A tuner, its model and its optimizer stopped in mid-run and made anew from their states."""
    make = partial(classifier, two_layers, RULES["AdamW"].make, (5,), place.device, steps=STEPS)
    with deterministic():
        whole, half, again = make(), make(), make()
        unbroken, stopped, tuner = tuned(whole), tuned(half, last=STEPS // 2), make_tuner(again)
        parts = (again.model, half.model), (again.optimizer, half.optimizer), (tuner, stopped)
        for new, old in parts:
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        tuned(again, STEPS // 2, STEPS, tuner)
    row = agrees(furthest(tuner, unbroken, SAME), "an unbroken run")
    pairs = zip(whole.model.parameters(), again.model.parameters())
    bits = all(torch.equal(a, b) for a, b in pairs)
    return {"detail": f"{row.pop('detail')}; weights {'' if bits else 'not '}the same bit for bit", **row}


def quickstart(place: Place) -> Row:
    """The tuned run of the quickstart, TensorBoard log and all."""
    from experiments import quickstart as script

    made_up = False
    try:
        datasets.digits()
    except ImportError:
        made_up = True
    steps = 200 if place.quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        args = script.Args(steps=steps, device=place.device, made_up=made_up)
        row, _ = script.train_tuned(args, Path(folder))
        logged = any(Path(folder).rglob("events.out.tfevents.*"))
    data = "made-up clusters, as scikit-learn is not installed" if made_up else "scikit-learn's digits"
    least = 0.5 if place.quick else 0.9
    line = f"{data}: test accuracy {row['test_accuracy']:.1%} after {steps} steps, lr 1e-4 to {row['lr']:.2g}"
    if not (row["test_accuracy"] > least and logged):
        raise AssertionError(f"{line}; more than {least:.0%} is expected" if logged else "no TensorBoard log")
    return {"detail": line, "test_accuracy": row["test_accuracy"], "lr": row["lr"]}


# ---- waits


def waits(place: Place) -> Row:
    """How often a step makes the CPU wait for the device, plain and tuned, for nets of 8 and 24 parameter tensors."""
    if not place.cuda:
        raise NotRun("there is no device to wait for")
    counts = {
        f"{how}_{2 * layers}": _waits(place.device, layers, how == "tuned")
        for layers in (4, 12)
        for how in ("plain", "tuned")
    }
    return {"detail": "waits a step: " + ", ".join(f"{name} {n:.1f}" for name, n in counts.items()), **counts}


def _waits(device: str, layers: int, tune: bool, steps: int = 20) -> float:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(32, 16, device=device), torch.randint(16, (32,), device=device)
    loss = lambda: cross_entropy(model(x), y)  # noqa: E731
    tuner = hypergrad.Tuner(model, optimizer, loss, total_steps=1000, warm_start=False) if tune else None

    def step() -> None:
        optimizer.zero_grad()
        tuner.backward(loss()) if tuner else loss().backward()
        optimizer.step()

    for _ in range(3):
        step()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in heard) / steps


# products in one step of three
PLAN = {"cost": 20.0, "product": 1.0, "validation": 1.0, "every": 4, "resting": 4, "stride": 3}
ONLINE_CHECKS: dict[str, Check] = {
    f"tuner, {rule}{', with a plan' if plan else ''}": partial(online, make=RULES[rule].make, plan=plan)
    for rule in ("SGD with momentum", "AdamW")
    for plan in (None, PLAN)
}
QUICKSTART: dict[str, Check] = {"quickstart": quickstart}
LOOP_CHECKS: dict[str, Check] = {f"loop: {name}": partial(live_loop, **options) for name, options in LOOPS.items()}
OTHERS: dict[str, Check] = {
    "tuner, two optimizers": partial(online, make=two_optimizers(False)),
    "tuner, resumed": resume,
}
WAITS: dict[str, Check] = {"waits for the device a step": waits}
