"""Loops of accelerate: prepared objects, checkpoints, a GradScaler, and what is left behind."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
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


def test_arguments_of_backward_in_another_order_are_an_error_that_names_them() -> None:
    from hypergrad.integrations.accelerate import backward

    job = runs.accelerate(Job())
    accelerator = job.framework[0]
    loss = runs.val_loss_of(job.net)
    for arguments in ((job.tuner, accelerator, loss), (accelerator, loss, job.tuner), (accelerator, accelerator, loss)):
        with pytest.raises(TypeError, match=r"backward\(accelerator, tuner, loss\)"):
            backward(*arguments)


def test_steps_of_the_optimizer_where_accumulation_ends_with_the_loader() -> None:
    """20 batches by three: accelerate takes seven steps an epoch. So many are what the page's formula gives."""
    steps = runs.EPOCHS * math.ceil(len(runs.loader()) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = runs.accelerate(Job(accumulate=3, scheduled=False), total_steps=steps)
    assert len(job.used) == job.tuner.stats["steps"] == steps == 14
    assert job.used[-1] < 0.2 * max(job.used) and job.tuner.stats["changed_gradients"] == 0


def in_two_models(job: Job, prepared: bool) -> Job:
    """The network in two halves, each with an optimizer of its own: in accelerate's loop, and in a plain one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from hypergrad.integrations.accelerate import backward

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bottom, top, batches = job.net[:2], job.net[2:], runs.loader()
    one: Any = job.optimizer(bottom.parameters())
    other: Any = torch.optim.Adam(top.parameters(), lr=1e-4)
    if prepared:
        bottom, top, one, other, batches = accelerator.prepare(bottom, top, one, other, batches)
    both = nn.ModuleList([bottom, top])
    tuner = hypergrad.Tuner(
        both,
        [one, other],
        lambda: runs.val_loss_of(lambda x: top(bottom(x))),
        total_steps=STEPS // 2,
        clip_norm=1.0,
        **job.options,
    )
    for _ in range(runs.EPOCHS):
        for i, (x, y) in enumerate(batches):
            loss = cross_entropy(top(bottom(x)), y)
            if not prepared:
                tuner.backward(loss / 2)
                if i % 2:
                    nn.utils.clip_grad_norm_(both.parameters(), 1.0)
                    for opt in (one, other):
                        opt.step()
                        opt.zero_grad()
                continue
            with accelerator.accumulate(bottom, top):
                backward(accelerator, tuner, loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(both.parameters(), 1.0)
                for opt in (one, other):
                    opt.step()
                    opt.zero_grad()
    tuner.close()
    return job.done(tuner)


def test_several_prepared_models_in_a_module_list_with_their_optimizers() -> None:
    one, other = in_two_models(Job(), prepared=True), in_two_models(Job(), prepared=False)
    assert one.used == other.used and len(one.used) == STEPS // 2
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    assert one.tuner.stats == other.tuner.stats and one.tuner.stats["hyper_steps"] > 3
    assert one.tuner.stats["changed_gradients"] == one.tuner.stats["plain_steps"] == 0


def test_a_checkpoint_of_a_run_without_a_tuner_is_loaded_before_the_tuner_is_registered(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from hypergrad.integrations.accelerate import backward

    def prepared() -> tuple[Any, Any, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        job, accelerator = Job(), Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(job.net, job.optimizer())

    accelerator, model, opt = prepared()
    opt.param_groups[0]["lr"] = 0.05  # of the other run: where the tuner starts, and no shape
    x, y = runs.train_set()[:64]
    accelerator.backward(cross_entropy(model(x), y))
    opt.step()
    accelerator.save_state(str(tmp_path))
    kept = [p.detach().clone() for p in model.parameters()]

    accelerator, model, opt = prepared()
    tuner = hypergrad.Tuner(model, opt, lambda: runs.val_loss_of(model), every=4)
    accelerator.load_state(str(tmp_path))
    accelerator.register_for_checkpointing(tuner)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    for _ in range(8):
        opt.zero_grad()
        backward(accelerator, tuner, cross_entropy(model(x), y))
        opt.step()
    assert tuner.stats["hyper_steps"] == 2 and tuner.stats["written_weights"] == 0
    assert 0.1 < float(tuner.applied["lr"] / tuner.values["lr"]) < 10  # not 500
