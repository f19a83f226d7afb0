"""A tuner in skorch's NeuralNet, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hypergrad.integrations.handover import check_val_loss, of_loss
from hypergrad.online.tuner import Tuner

try:
    from skorch.callbacks import Callback, GradientNormClipping
except ImportError as error:
    raise ImportError("this needs skorch: pip install 'torch-hypergrad[skorch]'.") from error


class TunerCallback(Callback):
    """Tune the hyperparameters of a net's optimizer while `fit` or `partial_fit` trains it.

    `total_steps` is `max_epochs` times the batches of an epoch, unless given; a GradientNormClipping among the net's callbacks is
    told to the tuner. The lr that the last step used is in the history, as lr/applied.

    Args:
        val_loss: `val_loss(net)` → scalar: the loss of validation data, such as `net.get_loss(net.infer(x), y)`.
        tune, **tuner_options: as of `hypergrad.Tuner`.

    Attributes:
        tuner_: the `hypergrad.Tuner` of the last fit. Closed when it has ended, by an exception in a training step too.
    """

    def __init__(
        self,
        val_loss: Callable[[Any], Tensor],
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
        self.hook_: Any = None  # on the optimizer
        self.loaded_: Mapping[str, Any] | None = None  # a state, until the tuner is made
        return self

    def on_train_begin(self, net: Any, **_: Any) -> None:
        self._close()
        self.tuner_ = None

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, **_: Any) -> None:
        """Make the tuner in the first epoch of a fit, where the number of batches is known."""
        if self.tuner_ is not None:
            return
        if len(net._optimizers) != 1:
            raise NotImplementedError(
                f"this net has the optimizers {net._optimizers}, which skorch steps one after the other on one closure: "
                "hypergrad tunes one. Give one optimizer the parameters of all, in several param groups."
            )
        options = {**self.get_params()}
        val_loss, tune = options.pop("val_loss"), options.pop("tune")
        check_val_loss(val_loss, "net")
        done = int(self.loaded_["loop"]["t"]) if self.loaded_ else 0
        options.setdefault("total_steps", done + net.max_epochs * len(net.get_iterator(dataset_train, training=True)))
        options = {**_clipping(net), **options}
        self.hook_ = net.optimizer_.register_step_pre_hook(partial(self._around_closure, net))
        try:
            self.tuner_ = Tuner(net.module_, net.optimizer_, lambda: val_loss(net), tune, **options)
            if self.loaded_:
                self.tuner_.load_state_dict(self.loaded_)
                self.loaded_ = None
        except BaseException:
            self._close()
            raise

    # skorch gives step a closure, in which train_step_single calls loss.backward() on what get_loss returned. This hook is called
    # before the tuner's, which then calls the closure.
    def _around_closure(self, net: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if len(args) < 2:
            return None  # a train_step of the user's own
        closure, own = args[1], net.get_loss

        def get_loss(*args: Any, **kw: Any) -> Tensor:
            loss = own(*args, **kw)
            if loss.requires_grad and self.tuner_ is not None:
                of_loss(loss, self.tuner_)
            return loss

        def computed() -> Any:
            net.get_loss = get_loss
            try:
                return closure()
            except BaseException:
                self._close()
                raise
            finally:
                del net.get_loss

        return (args[0], computed, *args[2:]), kwargs

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        assert self.tuner_ is not None
        if "lr" in self.tuner_.applied:
            net.history.record("lr/applied", float(self.tuner_.applied["lr"][0]))

    def on_train_end(self, net: Any, **_: Any) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The tuner's state, after a fit or in the middle of one."""
        if self.tuner_ is None:
            raise RuntimeError("there is no tuner yet: it is made when fit begins its first epoch.")
        return self.tuner_.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `partial_fit` of an initialized net go on from a state; load its module's and optimizer's beside it."""
        self.loaded_ = state

    def __getstate__(self) -> dict[str, Any]:
        return self.get_params()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.initialize()

    def _close(self) -> None:
        if self.tuner_ is not None:
            self.tuner_.close()
        if self.hook_ is not None:
            self.hook_.remove()
            self.hook_ = None


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
