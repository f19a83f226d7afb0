"""One small training run on digits, in a plain loop and in each framework's: the same model, batches, clipping and scheduler."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import hypergrad

pytest.importorskip("sklearn")
ROWS, BATCH, EPOCHS = 640, 32, 2
STEPS = ROWS // BATCH * EPOCHS


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def train_set() -> TensorDataset:
    x, y = digits()
    return TensorDataset(x[:ROWS], y[:ROWS])


def loader() -> DataLoader:
    """Training batches, in one order."""
    return DataLoader(train_set(), batch_size=BATCH)


def val_loss_of(predict: Callable[[Tensor], Tensor]) -> Tensor:
    x, y = digits()
    return cross_entropy(predict(x[1000:1200]), y[1000:1200])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def shape(t: int) -> float:
    """Of lr: down to zero at the end, as most people's schedulers."""
    return max(0.0, 1 - t / STEPS)


@dataclass
class Job:
    """What to train, and what was seen of it.

    Attributes:
        clip: threshold of clipping by norm; 0: none.
            accumulate: batches a step.
        stop: raise an exception in the forward pass number so and so.
        scheduled: with a scheduler of lr; without one lr has hypergrad's own shape.
    """

    clip: float = 1.0
    accumulate: int = 1
    stop: int = 0
    scheduled: bool = True
    options: dict[str, Any] = field(default_factory=lambda: {"every": 4})
    used: list[float] = field(default_factory=list)  # lr of every step
    tuner: Any = None
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net, self.forwards = network(), 0
        self.net.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += self.net.training and torch.is_grad_enabled()
        if self.stop and self.forwards == self.stop:
            raise ZeroDivisionError("stopped")

    def optimizer(self, params: Any = None) -> torch.optim.Optimizer:
        opt = torch.optim.SGD(params or self.net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-3)
        self.watch(opt)
        return opt

    def watch(self, opt: torch.optim.Optimizer) -> None:
        """Note the lr of every step: this hook is there before the tuner's, which puts back what a scheduler wrote."""
        opt.register_step_post_hook(lambda opt, *_: self.used.append(opt.param_groups[0]["lr"]))

    def scheduler(self, opt: Any) -> LambdaLR:
        return LambdaLR(opt, shape)

    def done(self, tuner: Any) -> Job:
        self.tuner, self.weights = tuner, [p.detach().clone() for p in self.net.parameters()]
        return self


def plain(job: Job, dtype: Any = None) -> Job:
    """dtype: torch.bfloat16 for autocast."""
    opt = job.optimizer()
    scheduler = job.scheduler(opt) if job.scheduled else None
    extra = {"clip_norm": job.clip} if job.clip else {}

    def val_loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            return val_loss_of(job.net)

    tuner = hypergrad.Tuner(
        job.net,
        opt,
        val_loss,
        total_steps=-(-STEPS // job.accumulate),
        **{**extra, **job.options},
    )
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                loss = cross_entropy(job.net(x), y)
            tuner.backward(loss / job.accumulate)
            if (i + 1) % job.accumulate == 0:
                if job.clip:
                    nn.utils.clip_grad_norm_(job.net.parameters(), job.clip)
                opt.step()
                opt.zero_grad()
                if scheduler is not None:
                    scheduler.step()
    tuner.close()
    return job.done(tuner)


# ---- Lightning


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says of every small run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")  # few workers, no logger, no validation, …
        yield


def lightning(
    job: Job,
    folder: Path | None = None,
    resume: Path | None = None,
    manual: bool = False,
    val_loss: Callable[[Any], Tensor] = lambda module: val_loss_of(module.net),
    compiled: str = "",
    **trainer_options: Any,
) -> Job:
    """compiled: "module" or "net": what torch.compile was called with."""
    from lightning.pytorch import LightningModule, Trainer

    from hypergrad.integrations.lightning import TunerCallback

    class Digits(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = job.net, not manual

        def configure_optimizers(self) -> Any:
            opt = job.optimizer()
            if not job.scheduled:
                return opt
            return {"optimizer": opt, "lr_scheduler": {"scheduler": job.scheduler(opt), "interval": "step"}}

        def training_step(self, batch: Any, i: int) -> Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            if manual:
                opt: Any = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(opt, gradient_clip_val=job.clip, gradient_clip_algorithm="norm")
                opt.step()
                if job.scheduled:
                    self.lr_schedulers().step()  # type: ignore[union-attr]
            return loss

    told = {"clip_norm": job.clip} if manual and job.clip else {}
    callback = TunerCallback(val_loss, **told, **job.options)
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "callbacks": [callback, *trainer_options.pop("callbacks", [])],
        "accumulate_grad_batches": job.accumulate,
        "gradient_clip_val": None if manual else job.clip or None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    trainer = Trainer(**{**options, **trainer_options})
    module: Any = Digits()
    if compiled == "net":
        module.net = torch.compile(job.net, backend="aot_eager")
    fitted = torch.compile(module, backend="aot_eager") if compiled == "module" else module
    try:
        with quiet():
            trainer.fit(fitted, loader(), ckpt_path=resume)
    finally:
        job.framework = trainer, module, callback  # type: ignore[attr-defined]
        job.done(callback.tuner)
    return job


# ---- Transformers


class WithLoss(nn.Module):
    """The network as Trainer wants it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def transformers(job: Job, folder: Path, resume: Path | None = None, **arguments: Any) -> Job:
    from transformers import Trainer, TrainingArguments

    from hypergrad.integrations.transformers import TunerMixin

    class Tuned(TunerMixin, Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=BATCH))  # type: ignore[arg-type]

    rows = [{"x": x, "labels": y} for x, y in train_set()]
    model, opt = WithLoss(job.net), job.optimizer()
    scheduler = job.scheduler(opt) if job.scheduled else LambdaLR(opt, lambda t: 1.0)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "gradient_accumulation_steps": job.accumulate,
        "max_grad_norm": job.clip,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    trainer = Tuned(
        model,
        TrainingArguments(**{**options, **arguments}),
        train_dataset=rows,
        optimizers=(opt, scheduler),
        val_loss=lambda model: val_loss_of(model.net),
        tuner_options=job.options,
    )
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        job.framework = trainer  # type: ignore[attr-defined]
        job.done(trainer.tuner)
    return job


# ---- accelerate


def accelerate(
    job: Job,
    folder: Path | None = None,
    first: int = 0,
    last: int = STEPS,
    total_steps: int | None = None,
    **options: Any,
) -> Job:
    """first, last: of the batches that are trained on; a state in `folder` is loaded before, and saved after them."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from hypergrad.integrations.accelerate import backward

    AcceleratorState._reset_state(reset_partial_state=True)  # one a process
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.accumulate, **options)
    opt: Any = job.optimizer()
    model, opt, batches = accelerator.prepare(job.net, opt, loader())
    scheduler = accelerator.prepare(job.scheduler(opt.optimizer)) if job.scheduled else None
    extra = {"clip_norm": job.clip} if job.clip else {}
    tuner = hypergrad.Tuner(
        model,
        opt,
        lambda: val_loss_of(model),
        scaler=accelerator.scaler,
        total_steps=total_steps or -(-STEPS // job.accumulate),
        **{**extra, **job.options},
    )
    accelerator.register_for_checkpointing(tuner)
    if first:
        accelerator.load_state(str(folder))
    step = 0
    for _ in range(EPOCHS):
        for x, y in batches:
            step += 1
            if not first < step <= last:
                continue
            with accelerator.accumulate(model):
                loss = cross_entropy(model(x), y)
                backward(accelerator, tuner, loss)
                if accelerator.sync_gradients and job.clip:
                    accelerator.clip_grad_norm_(model.parameters(), job.clip)
                opt.step()
                if scheduler is not None:
                    scheduler.step()
                opt.zero_grad()
    if last < STEPS:
        accelerator.save_state(str(folder))
    tuner.close()
    job.framework = accelerator, model, opt, scheduler  # type: ignore[attr-defined]
    return job.done(tuner)


# ---- skorch


def skorch(job: Job, folder: Path | None = None) -> Job:
    from skorch import NeuralNet
    from skorch.callbacks import GradientNormClipping, LRScheduler

    from hypergrad.integrations.skorch import TunerCallback

    class Net(NeuralNet):
        def initialize_optimizer(self, *args: Any, **kw: Any) -> Any:
            super().initialize_optimizer(*args, **kw)
            job.watch(self.optimizer_)
            return self

    class Accumulating(Net):
        """The recipe of skorch's FAQ, with clipping before the step."""

        def get_loss(self, *args: Any, **kw: Any) -> Tensor:
            return super().get_loss(*args, **kw) / job.accumulate

        def train_step(self, batch: Any, **fit_params: Any) -> Any:
            step = self.train_step_single(batch, **fit_params)
            if len(self.history[-1, "batches"]) % job.accumulate == 0:
                self.notify("on_grad_computed", named_parameters=self.get_all_learnable_params(), batch=batch)
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    def val_loss(net: Any) -> Tensor:
        return val_loss_of(net.module_)

    told = {"total_steps": STEPS // job.accumulate} if job.accumulate > 1 else {}
    callbacks: list[Any] = [("tuner", TunerCallback(val_loss, **told, **job.options))]
    if job.clip:
        callbacks.append(GradientNormClipping(job.clip))
    if job.scheduled:  # it steps once a batch
        lr_lambda = lambda batch: shape(batch // job.accumulate)  # noqa: E731
        callbacks.append(("lr", LRScheduler(LambdaLR, lr_lambda=lr_lambda, step_every="batch")))
    net = (Net if job.accumulate == 1 else Accumulating)(
        job.net,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        optimizer__weight_decay=1e-3,
        lr=1e-4,
        max_epochs=EPOCHS,
        batch_size=BATCH,
        train_split=None,
        callbacks=callbacks,
        verbose=0,
    )
    x, y = train_set().tensors
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Detected call of `lr_scheduler.step"
            )  # at the first of two batches
            net.fit(x, y)
    finally:
        job.net, job.framework = net.module_, net  # type: ignore[attr-defined]
        job.done(dict(net.callbacks_)["tuner"].tuner_)
    return job
