"""TunerCallback in skorch's nets: scikit-learn's protocol, going on, and what it leaves behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integrations import runs
from tests.integrations.runs import STEPS, Job
from tests.integrations.skorch_nets import Ends, EndsBefore, arrays, classifier, tuning, val_loss

HALF = STEPS // 2


def left_behind(job: Job) -> None:
    opt = job.framework.optimizer_
    assert not {"get_loss", "train_step"} & set(vars(job.framework))
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


def same(one: Any, other: Any) -> None:
    for p, q in zip(one.module_.parameters(), other.module_.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (net.tuner_ for net in (one, other))
    assert a.stats_ == b.stats_ and torch.equal(a.values_["lr"], b.values_["lr"])


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
    same(whole, again)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """By skorch's own Checkpoint and LoadInitState."""
    from skorch.callbacks import Checkpoint, LoadInitState

    saved = Checkpoint(dirname=str(tmp_path), monitor=None, f_tuner="tuner.pt")
    whole = classifier(max_epochs=4, train_split=None).fit(*arrays())
    killed = classifier(max_epochs=4, train_split=None)
    killed.callbacks += [("saved", saved), ("ends", Ends(ZeroDivisionError))]
    with pytest.raises(ZeroDivisionError):
        killed.fit(*arrays())
    again = classifier(max_epochs=2, train_split=None)
    again.callbacks.append(("load", LoadInitState(saved)))
    again.fit(*arrays())
    same(whole, again)
    assert again.history[:, "lr/applied"] == whole.history[:, "lr/applied"]


AGAIN: dict[str, Callable[[Any], Any]] = {
    "itself": lambda net: net,
    "a copy": copy.deepcopy,
    "a pickle": lambda net: pickle.loads(pickle.dumps(net)),
}


@pytest.mark.parametrize("name", AGAIN)
def test_partial_fit_goes_on_until_total_steps(name: str) -> None:
    """An epoch, another one, which Ctrl-C ends, and two more."""
    whole = classifier(max_epochs=4, train_split=None).fit(*arrays())
    tuner = tuning(total_steps=4 * 20)
    net = classifier([("ends", Ends(KeyboardInterrupt))], tuner, max_epochs=1, train_split=None)
    net.fit(*arrays())
    net.set_params(max_epochs=3).partial_fit(*arrays())
    again = AGAIN[name](net)
    again.set_params(max_epochs=2).partial_fit(*arrays())
    same(whole, again)


def test_partial_fit_is_a_run_by_itself_without_total_steps() -> None:
    net = classifier(train_split=None).fit(*arrays()).partial_fit(*arrays())
    assert net.tuner_.stats_["steps"] == 3 * 20 == net.tuner_.tuner_._loop.total


def test_a_new_optimizer_has_a_new_tuner() -> None:
    net = classifier(tuner=tuning(total_steps=1000), max_epochs=1, train_split=None).fit(*arrays())
    net.set_params(module__width=16)  # makes a new module, and an optimizer of it
    assert net.partial_fit(*arrays()).tuner_.stats_["steps"] == 20


def test_copies_and_pickles_keep_what_was_found() -> None:
    net = classifier().fit(*arrays())
    tuner = net.tuner_.tuner_
    assert tuner.values["lr"] > 100 * 1e-4
    for name in ("a copy", "a pickle"):
        kept = AGAIN[name](net).tuner_
        assert torch.equal(kept.values_["lr"], tuner.values["lr"]) and kept.stats_ == tuner.stats
        assert kept.loaded_ is None  # the run has ended


def test_what_was_used_is_in_the_history_before_other_callbacks_read_it() -> None:
    """In front of the tuner's is one that stops the fit, as EarlyStopping does."""
    groups = {"optimizer__param_groups": [("net.0*", {"lr": 1e-5})], "optimizer__weight_decay": 1e-3}
    tuner = tuning(tune=("lr", "weight_decay"))
    net = classifier([("ends", Ends(KeyboardInterrupt))], tuner, **groups).fit(*arrays())
    used = {f"{name}/applied/{g}": x[name] for g, x in enumerate(net.optimizer_.param_groups) for name in tuner.tune}
    assert len(net.history) == 2 and {k: x for k, x in net.history[-1].items() if "applied" in k} == used
    assert len(net.history[:, "lr/applied/1"]) == 2 and len(used) == 4


def test_an_exception_before_the_first_batch_leaves_a_net_that_is_copied_and_fitted() -> None:
    net = classifier()
    net.callbacks.append(("ends", EndsBefore(ZeroDivisionError)))
    with pytest.raises(ZeroDivisionError):
        net.fit(*arrays())
    for name in ("a copy", "a pickle"):
        again = AGAIN[name](net)
        assert np.array_equal(again.predict(arrays()[0]), net.predict(arrays()[0]))
    net.set_params(callbacks=net.callbacks[:1]).fit(*arrays())
    assert "train_step" not in vars(net) and net.tuner_.stats_["plain_steps"] == 0


def test_methods_that_were_set_on_the_net_are_there_afterwards() -> None:
    net, calls = classifier(), []

    def get_loss(*args: Any, **kw: Any) -> Any:
        calls.append("get_loss")
        return type(net).get_loss(net, *args, **kw)

    def train_step(*args: Any, **kw: Any) -> Any:
        calls.append("train_step")
        return type(net).train_step(net, *args, **kw)

    net.get_loss, net.train_step = get_loss, train_step
    net.fit(*arrays())
    assert net.get_loss is get_loss and net.train_step is train_step
    assert calls.count("train_step") == 3 * 16 < calls.count("get_loss") and net.tuner_.stats_["plain_steps"] == 0


def test_partial_fit_reads_the_validation_loss_in_train_mode() -> None:
    """skorch leaves the net in eval mode behind its validation data."""
    modes: list[bool] = []

    def noting(net: Any) -> Any:
        modes.append(net.module_.training)
        return val_loss(net)

    net = classifier(tuner=tuning(noting)).fit(*arrays())
    assert not net.module_.training
    net.partial_fit(*arrays())
    assert len(modes) > 10 and all(modes)


def test_an_unknown_clipping_is_refused() -> None:
    from skorch.callbacks import GradientNormClipping

    net = classifier()
    net.callbacks.append(("clip", GradientNormClipping(1.0, gradient_clip_norm_type=float("inf"))))
    with pytest.raises(NotImplementedError, match="gradient_clip_norm_type"):
        net.fit(*arrays())


def test_a_val_loss_that_is_no_function_is_refused() -> None:
    net = classifier().set_params(callbacks__tuner__val_loss=0.3)
    with pytest.raises(TypeError, match=r"^val_loss must be a function \(net\) -> scalar tensor, got float"):
        net.fit(*arrays())
