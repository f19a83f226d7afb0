"""Loops of accelerate: prepared objects, checkpoints, a GradScaler, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau

import hypergrad
from tests.integrations import runs
from tests.integrations.runs import STEPS, Job

pytest.importorskip("accelerate")
HALF = STEPS // 2


@pytest.mark.parametrize("scheduled", [True, False])
def test_resumes_bit_for_bit_with_register_for_checkpointing(tmp_path: Path, scheduled: bool) -> None:
    whole = runs.accelerate(Job(scheduled=scheduled))
    half = runs.accelerate(Job(scheduled=scheduled), tmp_path, last=HALF)
    again = runs.accelerate(Job(scheduled=scheduled), tmp_path, first=HALF)
    assert half.used + again.used == whole.used and len(again.used) == HALF
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, again.weights, strict=True))
    assert whole.tuner.stats == again.tuner.stats


def test_prepared_objects_and_those_inside_are_the_same_to_a_tuner() -> None:
    from hypergrad.integrations.accelerate import unwrap

    job = runs.accelerate(Job())
    _, model, opt, scheduler = job.framework
    inside = unwrap(model, opt, scheduler)
    assert inside[0] is job.net and inside[1] is opt.optimizer and inside[2] is scheduler.scheduler
    assert unwrap(opt) is opt.optimizer and unwrap(job.net) is job.net and unwrap(opt.optimizer) is opt.optimizer
    assert job.tuner.optimizers == [opt.optimizer]
    first = hypergrad.Tuner(model, opt, lambda: runs.val_loss_of(model))
    with pytest.raises(ValueError, match="has a tuner already"):
        hypergrad.Tuner(model, opt.optimizer, lambda: runs.val_loss_of(model))
    first.close()


def test_hypergradients_of_a_prepared_optimizer() -> None:
    """`hypergradient` takes it too."""
    from accelerate import Accelerator

    job = Job()
    model, opt = Accelerator(cpu=True).prepare(job.net, job.optimizer())
    batches = list(runs.loader())[:3]
    found = [
        hypergrad.hypergradient(
            model,
            optimizer,
            lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
            batches,
            lambda: runs.val_loss_of(model),
            ("lr",),
        ).gradients["lr"]
        for optimizer in (opt, opt.optimizer)
    ]
    assert torch.equal(*found) and bool((found[0] != 0).all())


def test_a_plateau_scheduler_of_a_prepared_optimizer_is_found() -> None:
    from accelerate import Accelerator

    from hypergrad.online.schedulers import holds_plateau

    job = Job()
    opt = Accelerator(cpu=True).prepare(job.optimizer())
    assert not holds_plateau(opt.optimizer)
    scheduler = ReduceLROnPlateau(opt)
    assert holds_plateau(opt.optimizer) and scheduler.optimizer is opt


def test_a_scaler_of_the_accelerator() -> None:
    """On the CPU accelerate has none, so it is given one: losses are scaled, steps that overflow left out."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from hypergrad.integrations.accelerate import backward

    def trained(scaled: bool) -> tuple[Job, hypergrad.Tuner]:
        job, accelerator = Job(), Accelerator(cpu=True)
        if scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model, opt = (
            accelerator.prepare_model(job.net),
            AcceleratedOptimizer(job.optimizer(), scaler=accelerator.scaler),
        )
        tuner = hypergrad.Tuner(
            model, opt, lambda: runs.val_loss_of(model), scaler=accelerator.scaler, clip_norm=1.0, **job.options
        )
        for i, (x, y) in enumerate(runs.loader()):
            loss = cross_entropy(model(x), y)
            backward(accelerator, tuner, loss * (float("inf") if scaled and i == 5 else 1))
            if i == 5 and not scaled:
                opt.zero_grad()
                continue
            if accelerator.scaler is not None:
                accelerator.scaler.unscale_(opt.optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        tuner.close()
        return job.done(tuner), tuner

    one, tuner = trained(False)
    other, scaled = trained(True)
    assert len(one.used) == 19 and other.used == pytest.approx(one.used, rel=1e-4)
    assert scaled.stats["changed_gradients"] == scaled.stats["plain_steps"] == 0
    assert scaled.stats["steps"] == tuner.stats["steps"] == 19


def test_backward_leaves_what_accelerates_backward_leaves() -> None:
    from accelerate import Accelerator

    from hypergrad.integrations.accelerate import backward, backward_by

    x, y = runs.train_set()[:32]
    grads = []
    for how in ("accelerate", "hypergrad", "closed", "with"):
        job, accelerator = Job(), Accelerator(cpu=True, gradient_accumulation_steps=3)
        model, opt = accelerator.prepare(job.net, job.optimizer())
        loss = cross_entropy(model(x), y)
        tuner: Any = None
        if how != "accelerate":
            tuner = hypergrad.Tuner(model, opt, lambda model=model: runs.val_loss_of(model))
        if how == "closed":
            tuner.close()
        if how == "accelerate":
            accelerator.backward(loss)
        elif how == "with":
            with backward_by(accelerator, tuner):
                accelerator.backward(loss)
            assert "backward" not in vars(accelerator)
        else:
            backward(accelerator, tuner, loss)
        assert tuner is None or tuner.stats["gradients"] == 0  # counted at steps
        grads.append([p.grad.clone() for p in job.net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))
