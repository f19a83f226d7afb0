"""A tuner in the Trainer of Hugging Face's Transformers, as a mixin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hypergrad.core.hyperparameters import START_FROM_ZERO
from hypergrad.integrations.accelerate import backward_by
from hypergrad.integrations.handover import check_val_loss
from hypergrad.online.hyper_vector import specification
from hypergrad.online.tuner import Tuner

try:
    from accelerate.utils import is_compiled_module
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("this needs Transformers: pip install 'transformers>=5' 'accelerate>=1'.") from error

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

STATE = "tuner.pt"  # beside optimizer.pt in a checkpoint's folder


class TunerMixin(Trainer):
    """Tune the hyperparameters of a Trainer's optimizer while it trains.

        class MyTrainer(TunerMixin, Trainer): ...

    Clipping (`max_grad_norm`, 1.0 by default), the length of the run and a GradScaler are read from the trainer, and its
    scheduler's shape is lr's. The tuner's state is in every checkpoint, and `train(resume_from_checkpoint=…)` goes on with it.
    In the trainer's log, learning_rate is the lr that the last step used in the first param group; weight_decay, … are beside it.
    Parameters that the Trainer leaves out of weight decay (biases, norms) stay out of it, also where it is tuned from 0.

    Args:
        val_loss: `val_loss(model)` → scalar: the loss of a validation batch, on `model.device`.
        tune: as of `hypergrad.Tuner`.
        tuner_options: its other arguments, by name.
        args, kwargs: those of the Trainer.

    Attributes:
        tuner: the `hypergrad.Tuner` of the last call of `train`; None before it. Closed when `train` has ended, by an exception
            too.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        if "Trainer" in order and order.index("Trainer") < order.index("TunerMixin"):
            raise TypeError(f"the mixin comes first: class {cls.__name__}(TunerMixin, Trainer).")

    def __init__(
        self,
        *args: Any,
        val_loss: Callable[[Any], Tensor],
        tune: str | Sequence[str] | Mapping[str, Any] = ("lr", "weight_decay"),
        tuner_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        check_val_loss(val_loss, "model")
        super().__init__(*args, **kwargs)
        self.val_loss, self.tune, self.tuner_options = val_loss, tune, dict(tuner_options or {})
        self.tuner: Tuner | None = None
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's, until the tuner is made
        self.add_callback(_MakeTuner(self))

    def make_tuner(self) -> None:
        """Make the tuner: weights, optimizer and scheduler are there, as a checkpoint had them."""
        self._close()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError("hypergrad cannot differentiate steps of DeepSpeed or FSDP: train without them.")
        done = 0 if self._loaded else self.state.global_step
        options = {"total_steps": self.state.max_steps - done, "scaler": self.accelerator.scaler}
        if self.args.max_grad_norm:
            options["clip_norm"] = float(self.args.max_grad_norm)
        model: Any = self.model
        wrapped: Any = self.model_wrapped
        called: Any = wrapped if is_compiled_module(wrapped) else model
        optimizer: Any = self.optimizer
        begun = self._begin_decay()
        try:
            self.tuner = Tuner(
                called, optimizer, lambda: self.val_loss(model), self.tune, **{**options, **self.tuner_options}
            )
        except BaseException:
            for group in begun:
                group["weight_decay"] = 0.0
            raise
        if self._loaded:
            self.tuner.load_state_dict(self._loaded)
            self._loaded = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._loaded = None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._close()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.tuner is not None
        with backward_by(self.accelerator, self.tuner):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs and self.tuner is not None:
            for name, values in self.tuner.applied.items():
                if name not in self.tuner.hypers and values.dim() == 1:
                    logs["learning_rate" if name == "lr" else name] = float(values[0])
        super().log(logs, *args, **kwargs)

    # Where weight decay is 0 in every group, a Tuner begins it in all of them.
    def _begin_decay(self) -> list[dict[str, Any]]:
        """Where weight decay is to be tuned from 0: begin it in the groups of the parameters that the Trainer would decay, alone.

        Returns those groups.
        """
        groups = cast(torch.optim.Optimizer, self.optimizer).param_groups
        if "weight_decay" not in specification(self.tune) or any(group.get("weight_decay", 0) for group in groups):
            return []
        model: Any = self.model
        decayed = set(self.get_decay_parameter_names(model))
        ids = {id(p) for name, p in model.named_parameters() if name in decayed}
        begun = [g for g in groups if "weight_decay" in g and g["params"] and all(id(p) in ids for p in g["params"])]
        for group in begun:
            group["weight_decay"] = START_FROM_ZERO["weight_decay"]
        return begun

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.tuner is not None and self.args.should_save:
            torch.save(self.tuner.state_dict(), Path(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint, STATE).exists():
            self._loaded = torch.load(Path(checkpoint, STATE), map_location="cpu", weights_only=True)

    def _close(self) -> None:
        if self.tuner is not None:
            self.tuner.close()


class _MakeTuner(TrainerCallback):
    """Make the trainer's tuner when it is ready to train."""

    def __init__(self, trainer: TunerMixin):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.make_tuner()
