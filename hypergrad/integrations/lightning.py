"""A tuner in Lightning's Trainer, as a callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

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
            raise ImportError("this needs Lightning: pip install 'torch-hypergrad[lightning]'.") from error

CLIPS = {"norm": "clip_norm", "value": "clip_value"}  # gradient_clip_algorithm → the tuner's argument


class TunerCallback(Callback):
    """Tune the hyperparameters of a LightningModule's optimizers while `trainer.fit` trains it.

    The trainer's loop, `training_step` and `configure_optimizers` stay as they are. `total_steps`, `clip_norm` and `scaler` are
    read from the trainer; the tuner's state is in every checkpoint, and `fit(ckpt_path=…)` goes on with it.

    Args:
        val_loss: `val_loss(module)` → scalar: the loss of a validation batch, on `module.device`. It is called in the
            trainer's precision, and must not log.
        tune, **tuner_options: as of `hypergrad.Tuner`. In manual optimization `total_steps` is the number of batches unless
            given, and what `self.clip_gradients` does is told by clip_norm=….

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tuner: weights, optimizers and schedulers are there, as a checkpoint had them."""
        self._close()
        if trainer.strategy.handles_gradient_accumulation:
            raise NotImplementedError(
                f"{type(trainer.strategy).__name__} takes the backward pass and the steps into its own hands: hypergrad cannot "
                "differentiate them. Train with strategy='auto'."
            )

        def val_loss() -> Tensor:
            with trainer.precision_plugin.forward_context():
                return self.val_loss(pl_module)

        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **_clipping(trainer)}
        options["total_steps"] = _steps(trainer, 0 if self._loaded else trainer.global_step)
        self.tuner = Tuner(pl_module, trainer.optimizers, val_loss, self.tune, **{**options, **self.tuner_options})
        if self._loaded:
            self.tuner.load_state_dict(self._loaded)
            self._loaded = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.tuner is not None:
            of_loss(loss, self.tuner)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self.tuner is not None
        for name, values in self.tuner.applied.items():
            if name not in self.tuner.hypers and values.dim() == 1:
                tags = [f"{name}/applied"] if len(values) == 1 else [f"{name}/applied/{g}" for g in range(len(values))]
                pl_module.log_dict(dict(zip(tags, values.tolist(), strict=True)))

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


def _steps(trainer: Trainer, done: int) -> int | None:
    """The optimizer steps of the rest of the run; None where the trainer does not know."""
    steps = trainer.estimated_stepping_batches
    return int(steps) - done if math.isfinite(steps) and steps > done else None


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
