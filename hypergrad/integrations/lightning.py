"""A tuner in Lightning's Trainer, as a callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hypergrad.core.user_warnings import warn_user
from hypergrad.integrations.handover import check_val_loss, of_loss
from hypergrad.online.tuner import Tuner

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:  # its other package; one program uses one of them
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ImportError as error:
            raise ImportError("this needs Lightning: pip install 'lightning>=2.2'.") from error

CLIPS = {"norm": "clip_norm", "value": "clip_value"}  # gradient_clip_algorithm → the tuner's argument


class TunerCallback(Callback):
    """Tune the hyperparameters of a LightningModule's optimizers while `trainer.fit` trains it.

    The trainer's loop, `training_step` and `configure_optimizers` stay as they are. `total_steps`, `clip_norm` and `scaler` are
    read from the trainer; the tuner's state is in every checkpoint, and `fit(ckpt_path=…)` goes on with it.

    Args:
        val_loss: `val_loss(module)` → scalar: the loss of a validation batch, on `module.device`. It is called in the
            trainer's precision, and must not call `self.log`.
        tune, **tuner_options: as of `hypergrad.Tuner`. In manual optimization `total_steps` is the number of batches unless
            given, and what `self.clip_gradients` does is told by clip_norm=….

    Raises:
        TypeError: val_loss is no function.

    Attributes:
        tuner: the `hypergrad.Tuner` of the last fit; None before it. Closed when the fit has ended, by an exception too.

    The values that a step used are logged as lr/applied, weight_decay/applied, … (with /0, /1, … for several param groups).
    """

    def __init__(
        self,
        val_loss: Callable[[Any], Tensor],
        tune: str | Sequence[str] | Mapping[str, Any] = ("lr", "weight_decay"),
        **tuner_options: Any,
    ):
        check_val_loss(val_loss, "module")
        self.val_loss, self.tune, self.tuner_options = val_loss, tune, tuner_options
        self.tuner: Tuner | None = None
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's, until the tuner is made
        self._first_epoch: int | None = None  # its batches so far; None: it is over
        self._taken = 0  # steps that the tuner had taken before it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tuner: weights, optimizers and schedulers are there, as a checkpoint had them."""
        self._close()
        if trainer.strategy.handles_gradient_accumulation:
            raise NotImplementedError(
                f"{type(trainer.strategy).__name__} takes the backward pass and the steps into its own hands: hypergrad cannot "
                "differentiate them. Train with strategy='auto'."
            )

        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise NotImplementedError(
                "the whole training_step is compiled, and torch cannot differentiate that twice: compile the network within the "
                "module, as in self.net = torch.compile(self.net), and fit the module itself."
            )

        def val_loss() -> Tensor:
            with trainer.precision_plugin.forward_context(), _refused_to_log(pl_module):
                return self.val_loss(pl_module)

        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **_clipping(trainer)}
        steps = _steps(trainer) - (0 if self._loaded else _steps_done(trainer))
        options["total_steps"] = int(steps) if math.isfinite(steps) and steps > 0 else None
        self.tuner = Tuner(pl_module, trainer.optimizers, val_loss, self.tune, **{**options, **self.tuner_options})
        if self._loaded:
            self.tuner.load_state_dict(self._loaded)
            self._loaded = None
        self._first_epoch, self._taken = 0, self.tuner.stats["steps"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.tuner is not None:
            of_loss(loss, self.tuner)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self.tuner is not None
        if self._first_epoch is not None:
            self._first_epoch += 1
        for name, values in self.tuner.applied.items():
            if name not in self.tuner.hypers and values.dim() == 1:
                tags = [f"{name}/applied"] if len(values) == 1 else [f"{name}/applied/{g}" for g in range(len(values))]
                pl_module.log_dict(dict(zip(tags, values.tolist(), strict=True)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the first epoch say where manual optimization takes far fewer steps than the run's length was taken to have."""
        batches, self._first_epoch = self._first_epoch, None
        if pl_module.automatic_optimization or "total_steps" in self.tuner_options or not batches:
            return
        assert self.tuner is not None
        taken = self.tuner.stats["steps"] - self._taken
        supposed, now = _steps(trainer), _steps(trainer, taken / batches)
        if taken and math.isfinite(supposed) and 2 * now <= supposed and trainer.is_global_zero:
            warn_user(
                f"{batches} batches took {taken} training steps, not one each: lr will not have come to the end of its shape "
                f"when the run has. Pass total_steps={math.ceil(now)} to TunerCallback.",
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.tuner is None else self.tuner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._close()

    def _close(self) -> None:
        if self.tuner is not None:
            self.tuner.close()


@contextmanager
def _refused_to_log(module: LightningModule) -> Iterator[None]:
    """Raise where the module logs: a validation loss is read in the middle of training."""

    def log(name: str, *_: Any, **__: Any) -> None:
        raise RuntimeError(
            f"val_loss calls self.log({name!r}), which would log at the training steps in which hypergrad reads it. Compute the "
            "loss in a method of its own, which validation_step and val_loss both call."
        )

    own = vars(module)
    before = {"log": own["log"]} if "log" in own else {}
    own["log"] = log
    try:
        yield
    finally:
        del own["log"]
        own |= before


def _steps(trainer: Trainer, a_batch: float = 1.0) -> float:
    """The training steps of the whole run; not finite, or not positive, where the trainer does not know.

    In manual optimization the trainer knows batches, and counts the steps of every optimizer; a training step is one of each.

    Args:
        a_batch: training steps of a batch, in manual optimization.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.estimated_stepping_batches
    endless = trainer.max_epochs in (None, -1)
    batches = math.inf if endless else trainer.num_training_batches * trainer.max_epochs  # type: ignore[operator]
    most = math.inf if trainer.max_steps == -1 else math.ceil(trainer.max_steps / len(trainer.optimizers))
    return min(batches * a_batch, most)


def _steps_done(trainer: Trainer) -> int:
    """The training steps that were taken so far, in manual optimization one of each optimizer."""
    automatic = trainer.lightning_module.automatic_optimization
    return trainer.global_step // (1 if automatic else len(trainer.optimizers))


def _clipping(trainer: Trainer) -> dict[str, float]:
    if not trainer.gradient_clip_val:
        return {}
    algorithm = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm")
    if algorithm not in CLIPS:
        raise NotImplementedError(
            f"gradient_clip_algorithm={algorithm!r} is not known to hypergrad: use {' or '.join(map(repr, CLIPS))}, or "
            "gradient_clip_val=None."
        )
    return {CLIPS[algorithm]: float(trainer.gradient_clip_val)}
