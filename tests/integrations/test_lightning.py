"""TunerCallback in Lightning's Trainer: checkpoints, precision, clipping, and what it leaves behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import runs
from tests.integrations.runs import STEPS, Job

pytest.importorskip("lightning")
HALF = STEPS // 2  # one epoch


@pytest.mark.parametrize("scheduled", [True, False])
def test_resumes_bit_for_bit_from_a_checkpoint(tmp_path: Path, scheduled: bool) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = runs.lightning(Job(scheduled=scheduled), tmp_path, callbacks=[saved], enable_checkpointing=True)
    again = runs.lightning(Job(scheduled=scheduled), tmp_path, resume=tmp_path / "epoch=0.ckpt")
    assert len(again.used) == HALF and again.used == whole.used[HALF:]
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, again.weights, strict=True))
    assert whole.tuner.stats == again.tuner.stats


def test_a_checkpoint_of_a_run_without_a_tuner_is_gone_on_with(tmp_path: Path) -> None:
    """The steps that are left are the run's length then."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    runs.lightning(Job(), tmp_path, callbacks=[saved], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    again = runs.lightning(Job(), tmp_path, resume=tmp_path / "plain.ckpt")
    assert again.tuner.stats["steps"] == HALF and again.tuner._loop.total == HALF


def test_bf16_is_that_of_the_plain_loop() -> None:
    one = runs.plain(Job(), torch.bfloat16)
    other = runs.lightning(Job(), precision="bf16-mixed")
    assert other.tuner.stats["changed_gradients"] == other.tuner.stats["plain_steps"] == 0
    assert len(other.used) == STEPS and other.used == one.used != runs.plain(Job()).used
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


def test_float16_with_a_scaler() -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    one, found = runs.plain(Job()), runs.lightning(Job(), plugins=[precision])
    assert found.tuner.stats["changed_gradients"] == found.tuner.stats["plain_steps"] == 0
    assert len(found.used) == STEPS and max(found.used) == pytest.approx(max(one.used), rel=0.5)


def test_lr_as_it_was_used_is_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, version="")
    found = runs.lightning(Job(), logger=logger, log_every_n_steps=1)
    header, *rows = [row.split(",") for row in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    lrs = [float(row[header.index("lr/applied")]) for row in rows]
    assert lrs == pytest.approx(found.used, rel=1e-5) and "weight_decay/applied" in header


def left_behind(job: Job) -> None:
    """Nothing of the tuner's is on the user's and the framework's objects."""
    trainer, module, callback = job.framework
    (opt,) = trainer.optimizers if trainer.optimizers else [None]
    assert "backward" not in vars(module) and "backward" not in vars(trainer.strategy)
    if opt is not None:
        assert len(opt._optimizer_step_pre_hooks) == 0 and len(opt._optimizer_step_post_hooks) == 1  # the test's own
    assert callback.tuner is not None and callback.tuner._closed


def test_nothing_is_left_after_fit() -> None:
    left_behind(runs.lightning(Job()))


def test_nothing_is_left_after_an_exception() -> None:
    job = Job(stop=7)
    with pytest.raises(ZeroDivisionError):
        runs.lightning(job)
    left_behind(job)
    assert job.tuner.stats["steps"] == 4  # two of the forward passes were of validation losses


def test_the_same_callback_fits_again() -> None:
    job = runs.lightning(Job())
    trainer, module, callback = job.framework
    first = callback.tuner
    trainer.fit_loop.max_epochs += 1
    with runs.quiet():
        trainer.fit(module, runs.loader())
    assert callback.tuner is not first and callback.tuner.stats["steps"] == HALF
    assert callback.tuner._loop.total == HALF
    left_behind(job)


@pytest.mark.parametrize("kind", ["value", "own"])
def test_other_clipping(kind: str) -> None:
    """Clipping by value is known; a way of the user's own is told to the tuner."""
    if kind == "value":
        clipped = runs.lightning(Job(), gradient_clip_algorithm="value", gradient_clip_val=0.05)
        assert clipped.used != runs.plain(Job()).used
        assert clipped.tuner.stats["changed_gradients"] == 0 < clipped.tuner.stats["hyper_steps"]
        return
    one, other = runs.plain(Job()), Job()
    other.options["clip_norm"] = 1.0

    from lightning.pytorch import Callback

    class Own(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)

    found = runs.lightning(other, gradient_clip_val=None, callbacks=[Own()])
    assert found.used == one.used and found.tuner.stats["changed_gradients"] == 0


@pytest.fixture
def manual() -> Any:
    """fit(steps, toggled, …) → trainer, callback: two optimizers in manual optimization.

    steps(batch, i, step): the user's training_step, which calls step(j, batch) for optimizer j's step.
    told: options of TunerCallback; others are the Trainer's.
    """
    from lightning.pytorch import LightningModule, Trainer
    from torch.nn.functional import cross_entropy

    from hypergrad.integrations.lightning import TunerCallback

    class Two(LightningModule):
        def __init__(self, steps: Any, toggled: bool) -> None:
            super().__init__()
            self.net, self.automatic_optimization = runs.network(), False
            self.steps, self.toggled = steps, toggled

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=1e-3) for layer in (self.net[0], self.net[2])]

        def step(self, j: int, batch: Any) -> None:
            opt: Any = self.optimizers()[j]  # type: ignore[index]
            if self.toggled:
                self.toggle_optimizer(opt)
            opt.zero_grad()
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            opt.step()
            if self.toggled:
                self.untoggle_optimizer(opt)

        def training_step(self, batch: Any, i: int) -> None:
            self.steps(batch, i, self.step)

    def fit(
        steps: Any, toggled: bool = False, val_loss: Any = None, told: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        callback = TunerCallback(
            val_loss or (lambda module: runs.val_loss_of(module.net)), tune="lr", every=4, **(told or {})
        )
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", callbacks=[callback], **off, **options)
        with runs.quiet():
            trainer.fit(Two(steps, toggled), runs.loader())
        return trainer, callback

    return fit


def in_turn(batch: Any, i: int, step: Any) -> None:
    for j in range(2):
        step(j, batch)


def every_other(batch: Any, i: int, step: Any) -> None:
    """As where gradients are accumulated by hand."""
    if i % 2:
        in_turn(batch, i, step)


@pytest.mark.parametrize("toggled", [False, True])
def test_two_optimizers_in_manual_optimization(manual: Any, toggled: bool) -> None:
    """Each steps in turn; a training step is done when both have. Frozen in the other's step or not, training is the same."""
    of_first = lambda module: module.net[0].weight.square().mean()  # noqa: E731
    tuner = manual(in_turn, toggled, max_epochs=1)[1].tuner
    assert tuner.stats["steps"] == HALF
    assert tuner.values["lr"].shape == (2,) and bool((tuner.values["lr"] > 1e-2).all())
    ends = [manual(in_turn, each, of_first, max_epochs=1)[1].tuner.values["lr"].tolist() for each in (toggled, False)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 1}, {"max_steps": 2 * HALF}, {"max_steps": 2 * HALF - 1}, {"max_epochs": 1, "max_steps": 99}],
)
def test_length_of_a_run_of_two_optimizers(manual: Any, options: dict[str, int]) -> None:
    """max_steps counts the steps of each: lr has come to its end when the run has."""
    tuner = manual(in_turn, **options)[1].tuner
    assert tuner.stats["steps"] == tuner._loop.total == HALF


def test_length_of_a_second_fit_of_two_optimizers(manual: Any) -> None:
    """global_step counts the steps of each, too."""
    import lightning.pytorch as pl

    class Again(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            totals.append(callback.tuner._loop.total)

    totals: list[int] = []
    trainer, callback = manual(in_turn, max_epochs=1)
    trainer.callbacks.append(Again())
    trainer.fit_loop.max_epochs = 2
    with runs.quiet():
        trainer.fit(trainer.lightning_module, runs.loader())
    assert totals == [HALF] and callback.tuner.stats["steps"] == HALF


def test_steps_that_are_not_one_a_batch_are_said_after_the_first_epoch(manual: Any) -> None:
    with pytest.warns(UserWarning, match=f"{HALF} batches took {HALF // 2} .*total_steps={HALF}"):
        manual(every_other, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        told = manual(every_other, told={"total_steps": HALF}, max_epochs=2)[1].tuner
        manual(in_turn, max_epochs=2)
    assert told.stats["steps"] == HALF


def test_val_loss_that_logs_is_an_error_before_training() -> None:
    """It would log at every tenth step, under the names of validation."""
    from torch.nn.functional import cross_entropy

    job = Job()
    x, y = runs.digits()

    def validation_step(module: Any) -> Any:
        loss = cross_entropy(module.net(x[1000:1200]), y[1000:1200])
        module.log_dict({"val_loss": loss})
        return loss

    before = [p.clone() for p in job.net.parameters()]
    with pytest.raises(RuntimeError, match=r"val_loss calls self\.log\('val_loss'\).*method of its own"):
        runs.lightning(job, val_loss=validation_step)
    assert all(torch.equal(a, b) for a, b in zip(before, job.net.parameters(), strict=True))
    trainer, module, _ = job.framework
    assert "log" not in vars(module) and trainer.callback_metrics == {}


@pytest.mark.slow
def test_a_compiled_module_is_refused_with_what_works() -> None:
    """Lightning then compiles training_step as a whole; a network compiled in the module trains."""
    job = Job()
    with pytest.raises(NotImplementedError, match=r"self\.net = torch\.compile\(self\.net\)"):
        runs.lightning(job, compiled="module")
    assert all(torch.equal(a, b) for a, b in zip(job.weights, runs.network().parameters(), strict=True))
    tuner = runs.lightning(Job(), compiled="net", max_epochs=1).tuner
    assert tuner.stats["steps"] == HALF and tuner.stats["plain_steps"] == 0 < tuner.stats["hyper_steps"]


def test_what_is_no_function_is_refused_where_it_is_given() -> None:
    from hypergrad.integrations.lightning import TunerCallback

    with pytest.raises(TypeError, match=r"val_loss must be a function \(module\) -> scalar tensor, got str"):
        TunerCallback("val_loss")  # type: ignore[arg-type]
