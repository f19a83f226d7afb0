"""A tuner in skorch's NeuralNet, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hypergrad.core.second_order import twice_differentiable
from hypergrad.core.user_warnings import warn_user
from hypergrad.differentiate.arguments import without_wrappers
from hypergrad.integrations.handover import check_val_loss, of_loss
from hypergrad.integrations.skorch_validation import modes_kept, of_validation_data
from hypergrad.online.tuner import Tuner

try:
    from skorch.callbacks import Callback, GradientNormClipping
except ImportError as error:
    raise ImportError("this needs skorch: pip install 'skorch>=1'.") from error


class TunerCallback(Callback):
    """Tune the hyperparameters of a net's optimizer while `fit` or `partial_fit` trains it.

    `total_steps` is `max_epochs` times the batches of an epoch, unless given. Where it is given, `partial_fit` goes on with the
    tuner until that many steps are done. A GradientNormClipping among the net's callbacks is told to the tuner. The values that
    the last step used are in the history, as lr/applied, weight_decay/applied, … (with /0, /1, … for several param groups).

    Args:
        val_loss: `val_loss(net)` → scalar: the loss of validation data, such as `net.get_loss(net.infer(x), y)`. None: the mean
            loss of 256 rows, drawn once, of what the net's train_split holds out; in eval mode, but for BatchNorm.
        tune, **tuner_options: as of `hypergrad.Tuner`.

    Attributes:
        tuner_: the `hypergrad.Tuner` of the last fit. Closed when it has ended, by an exception in a training step too. Copies
            and pickles do not have it. Its model is the net's `module_`; a ModuleDict where the net trains more than that.
        values_, stats_: the tuner's, when it was closed. Copies and pickles have them.
    """

    def __init__(
        self,
        val_loss: Callable[[Any], Tensor] | None = None,
        tune: str | Sequence[str] | Mapping[str, Any] = ("lr", "weight_decay"),
        **tuner_options: Any,
    ):
        self.val_loss, self.tune = val_loss, tune
        vars(self).update(tuner_options)  # each a parameter of scikit-learn's protocol

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if not name.endswith("_")}

    def set_params(self, **params: Any) -> TunerCallback:
        vars(self).update(params)
        return self

    def initialize(self) -> TunerCallback:
        self.tuner_: Tuner | None = None
        self.loaded_: Mapping[str, Any] | None = None  # a state, until the tuner is made
        self.steps_ = 0  # done before the epoch
        self.values_: dict[str, Tensor] = {}
        self.stats_: dict[str, int] = {}
        return self

    def on_train_begin(self, net: Any, **_: Any) -> None:
        _put_back(net)
        same = self.tuner_ is not None and self.tuner_.optimizers == [without_wrappers(net.optimizer_)]
        self.loaded_ = self.loaded_ or (self._unfinished() if same else None)
        self._close()
        self.tuner_ = None
        net.tuner_ = self  # by which Checkpoint(f_tuner=…) saves its state, and load_params loads it

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **_: Any) -> None:
        if self.tuner_ is None:  # only now the data are known
            self.tuner_ = self._made(net, dataset_train, dataset_valid)
        self.steps_ = self.tuner_.stats["steps"]
        # fit_loop reads it next, for the whole epoch; on_batch_begin puts it back
        vars(net)["train_step"] = partial(self._train_step, net, net.train_step, "train_step" in vars(net))

    def _made(self, net: Any, dataset_train: Any, dataset_valid: Any) -> Tuner:
        if len(net._optimizers) != 1:
            raise NotImplementedError(
                f"this net has the optimizers {net._optimizers}, which skorch steps one after the other on one closure: "
                "hypergrad tunes one. Give one optimizer the parameters of all, in several param groups."
            )
        options = self.get_params()
        given, tune = options.pop("val_loss"), options.pop("tune")
        if given is not None:
            check_val_loss(given, "net")
        val_loss = of_validation_data(net, dataset_valid) if given is None else partial(given, net)
        options.setdefault("total_steps", _steps(net, dataset_train, self.loaded_))
        options.setdefault("scaler", getattr(_accelerator(net), "scaler", None))
        with modes_kept(net):
            net._set_training(True)  # as in a step: the epoch before has ended in eval mode
            tuner = Tuner(_trained(net), net.optimizer_, lambda: val_loss(), tune, **{**_clipping(net), **options})
        if self.loaded_:
            try:
                tuner.load_state_dict(self.loaded_)
            except BaseException:
                tuner.close()
                raise
            self.loaded_ = None
        return tuner

    def on_batch_begin(self, net: Any, **_: Any) -> None:
        _put_back(net)

    def _train_step(self, net: Any, own: Callable[..., Any], _: bool, *args: Any, **kwargs: Any) -> Any:
        """The net's own training step, and within it backward calls of the tuner, in a closure or without."""
        if self.tuner_ is None:  # a copy of the net
            return own(*args, **kwargs)
        try:
            with _handed_over(net, self.tuner_):
                return own(*args, **kwargs)
        except BaseException:
            self._close()
            raise

    def on_batch_end(self, net: Any, training: bool = False, **_: Any) -> None:
        """Record what was used, before other callbacks read the history at the end of the epoch."""
        if not training or self.tuner_ is None:
            return
        for name, values in self.tuner_.applied.items():
            if name not in self.tuner_.hypers and values.dim() == 1:
                tags = [f"{name}/applied"] if len(values) == 1 else [f"{name}/applied/{g}" for g in range(len(values))]
                for tag, x in zip(tags, values.tolist(), strict=True):
                    net.history.record(tag, x)

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        """Say it once where not every batch is a step, and total_steps was taken to be the number of batches."""
        assert self.tuner_ is not None
        steps, batches = self.tuner_.stats["steps"] - self.steps_, net.history[-1, "train_batch_count"]
        if (
            self.tuner_.stats["steps"] == steps < -(-batches // _accumulated(net))
            and "total_steps" not in self.get_params()
        ):
            warn_user(
                f"this net took {steps} optimizer steps in an epoch of {batches} batches, and lr is shaped for a step at every "
                f"batch: it will not have decayed at the end. Give TunerCallback total_steps={steps * net.max_epochs}, the "
                "optimizer steps of the whole run.",
            )

    def on_train_end(self, net: Any, **_: Any) -> None:
        _put_back(net)
        self._close()

    def backward(self, loss: Tensor) -> None:
        """In place of `loss.backward()` in a train_step_single of the net's own: `self.tuner_.backward(loss)`."""
        loss.backward() if self.tuner_ is None else self.tuner_.backward(loss)

    def state_dict(self) -> dict[str, Any]:
        """The tuner's state, after a fit or in the middle of one."""
        if self.tuner_ is None:
            raise RuntimeError("there is no tuner yet: it is made when fit begins its first epoch.")
        return self.tuner_.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `partial_fit` of an initialized net go on from a state; load its module's and optimizer's beside it."""
        self.loaded_ = state

    def _unfinished(self) -> dict[str, Any] | None:
        """The state of a tuner that has not come to the total_steps that it was given; None otherwise."""
        total = vars(self).get("total_steps")
        short = self.tuner_ is not None and total is not None and self.tuner_.stats["steps"] < total
        return self.state_dict() if short else None

    def __getstate__(self) -> dict[str, Any]:
        self._read()
        if "tuner_" not in vars(self):
            return self.get_params()
        state = tree_map_only(Tensor, Tensor.cpu, self.loaded_ or self._unfinished())  # to be read without a GPU too
        return self.get_params() | {"values_": self.values_, "stats_": self.stats_, "loaded_": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.initialize()
        vars(self).update(state)

    def _read(self) -> None:
        if vars(self).get("tuner_") is not None:
            self.values_, self.stats_ = self.tuner_.values, self.tuner_.stats  # type: ignore[union-attr]

    def _close(self) -> None:
        self._read()
        if self.tuner_ is not None:
            self.tuner_.close()


def _put_back(net: Any) -> None:
    """Let the net have its own train_step again."""
    step = vars(net).get("train_step")
    if isinstance(step, partial) and getattr(step.func, "__func__", None) is TunerCallback._train_step:
        _, own, of_the_instance = step.args
        del vars(net)["train_step"]
        vars(net).update({"train_step": own} if of_the_instance else {})


@contextmanager
def _handed_over(net: Any, tuner: Tuner) -> Iterator[None]:
    """What get_loss returns calls the tuner's backward; of an AccelerateMixin, what is given to accelerator.backward."""
    own, had = net.get_loss, {name: x for name, x in vars(net).items() if name == "get_loss"}
    compiled = any(hasattr(getattr(net, f"{name}_"), "_orig_mod") for name in net._criteria)
    accelerator, accelerated = _accelerator(net), nullcontext()
    if accelerator is not None:
        from hypergrad.integrations.accelerate import backward_by

        accelerated = backward_by(accelerator, tuner)

    def get_loss(*args: Any, **kwargs: Any) -> Any:
        with twice_differentiable() if compiled else nullcontext():
            loss = own(*args, **kwargs)
        if accelerator is None and isinstance(loss, Tensor) and loss.requires_grad:
            of_loss(loss, tuner)
        return loss

    vars(net)["get_loss"] = get_loss
    try:
        with accelerated:
            yield
    finally:
        del vars(net)["get_loss"]
        vars(net).update(had)


def _accelerator(net: Any) -> Any:
    """The Accelerator of a net with skorch's AccelerateMixin; None of others."""
    mixed_in = any((c.__module__, c.__name__) == ("skorch.hf", "AccelerateMixin") for c in type(net).__mro__)
    return net.accelerator if mixed_in else None


def _accumulated(net: Any) -> int:
    """The batches of a step, where an Accelerator knows them."""
    return getattr(_accelerator(net), "gradient_accumulation_steps", 1)


def _trained(net: Any) -> nn.Module:
    """The module; a ModuleDict where the net has more modules, or criteria with parameters."""
    parts = {name: getattr(net, f"{name}_") for name in [*net._modules, *net._criteria]}
    parts = {name: x for name, x in parts.items() if isinstance(x, nn.Module)}
    held = {name: x for name, x in parts.items() if name in net._modules or any(True for _ in x.parameters())}
    return net.module_ if held.keys() <= {"module"} else nn.ModuleDict(held)


def _steps(net: Any, dataset: Any, state: Mapping[str, Any] | None) -> int | None:
    """The steps of a fit, behind those of a state; None where the data have no length."""
    try:
        batches = len(net.get_iterator(dataset, training=True))
    except TypeError:  # an IterableDataset
        return None
    return net.max_epochs * -(-batches // _accumulated(net)) + (int(state["loop"]["t"]) if state else 0)


def _clipping(net: Any) -> dict[str, float]:
    """What a GradientNormClipping of the net does."""
    for _, callback in net.callbacks_:
        if isinstance(callback, GradientNormClipping) and callback.gradient_clip_value is not None:
            if callback.gradient_clip_norm_type != 2:
                raise NotImplementedError(
                    f"gradient_clip_norm_type={callback.gradient_clip_norm_type} is not known to hypergrad: use 2."
                )
            return {"clip_norm": float(callback.gradient_clip_value)}
    return {}
