"""TunerCallback in skorch's nets: scikit-learn's protocol, going on, and what it leaves behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.integrations import runs
from tests.integrations.runs import STEPS, Job

pytest.importorskip("skorch")
HALF = STEPS // 2


def left_behind(job: Job) -> None:
    opt = job.framework.optimizer_
    assert "get_loss" not in vars(job.framework)
    assert len(opt._optimizer_step_pre_hooks) == 0 and len(opt._optimizer_step_post_hooks) == 1  # the test's own
    assert job.tuner._closed


def test_nothing_is_left_after_fit() -> None:
    job = runs.skorch(Job())
    left_behind(job)
    history = job.framework.history[:, "lr/applied"]
    assert history == [job.used[HALF - 1], job.used[-1]]


def test_nothing_is_left_after_an_exception() -> None:
    job = Job(stop=7)
    with pytest.raises(ZeroDivisionError):
        runs.skorch(job)
    left_behind(job)
    assert job.tuner.stats["steps"] == 4


def val_loss(net: Any) -> Tensor:
    x, y = runs.digits()
    return net.get_loss(net.infer(x[1000:1200]), y[1000:1200])


class Probabilities(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def classifier(**options: Any) -> Any:
    """skorch's own: its loss takes the logarithm of probabilities, in get_loss."""
    from skorch import NeuralNetClassifier

    from hypergrad.integrations.skorch import TunerCallback

    torch.manual_seed(0)
    callbacks = [("tuner", TunerCallback(val_loss, tune="lr", every=4))]
    silent = {"verbose": 0, "callbacks__print_log": None}  # it holds `print`, which Ray replaces
    return NeuralNetClassifier(
        Probabilities, lr=1e-4, batch_size=32, callbacks=callbacks, **silent, **{"max_epochs": 3, **options}
    )


def arrays() -> tuple[np.ndarray, np.ndarray]:
    x, y = runs.train_set().tensors
    return x.numpy(), y.numpy()


def test_a_classifier_with_a_validation_split() -> None:
    net = classifier().fit(*arrays())
    tuner = dict(net.callbacks_)["tuner"].tuner_
    assert tuner.stats["steps"] == 3 * 16 == tuner._loop.total  # a fifth of the rows validates
    assert tuner.stats["plain_steps"] == 0 and net.history[-1, "valid_acc"] > 0.8


def test_scikit_learns_protocol() -> None:
    from sklearn.base import clone

    original = classifier()
    net = clone(original)
    net.set_params(callbacks__tuner__every=3, callbacks__tuner__seed=1)
    assert dict(original.callbacks)["tuner"].get_params() == {"val_loss": val_loss, "tune": "lr", "every": 4}
    net.fit(*arrays())
    tuner = dict(net.callbacks_)["tuner"].tuner_
    assert tuner._loop.every == 3 and tuner._hyper.seed == 1
    again = pickle.loads(pickle.dumps(net))
    assert np.array_equal(again.predict_proba(arrays()[0]), net.predict_proba(arrays()[0]))


def test_goes_on_bit_for_bit() -> None:
    """One fit of four epochs, and two of two with the state handed on; the runs' shape of lr is of four."""
    whole = classifier(max_epochs=4, train_split=None).fit(*arrays())
    half = classifier(max_epochs=2, train_split=None)
    half.set_params(callbacks__tuner__total_steps=4 * 20)
    half.fit(*arrays())
    state = copy.deepcopy(dict(half.callbacks_)["tuner"].state_dict())
    again = classifier(max_epochs=2, train_split=None).initialize()
    again.module_.load_state_dict(half.module_.state_dict())
    again.optimizer_.load_state_dict(half.optimizer_.state_dict())
    dict(again.callbacks_)["tuner"].load_state_dict(state)
    again.partial_fit(*arrays())
    for p, q in zip(whole.module_.parameters(), again.module_.parameters(), strict=True):
        assert torch.equal(p, q)
    one, other = (dict(net.callbacks_)["tuner"].tuner_ for net in (whole, again))
    assert one.stats == other.stats and torch.equal(one.values["lr"], other.values["lr"])


def test_an_unknown_clipping_is_refused() -> None:
    from skorch.callbacks import GradientNormClipping

    net = classifier()
    net.callbacks.append(("clip", GradientNormClipping(1.0, gradient_clip_norm_type=float("inf"))))
    with pytest.raises(NotImplementedError, match="gradient_clip_norm_type"):
        net.fit(*arrays())


def test_a_val_loss_that_is_none_is_refused() -> None:
    net = classifier().set_params(callbacks__tuner__val_loss=None)
    with pytest.raises(TypeError, match=r"^val_loss must be a function \(net\) -> scalar tensor, got NoneType"):
        net.fit(*arrays())
