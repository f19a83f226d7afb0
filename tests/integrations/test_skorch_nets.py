"""TunerCallback in nets that people write with skorch: what is trained in each, and on which validation data it is tuned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from tests.integrations import runs
from tests.integrations.skorch_nets import Accumulating, Noisy, OwnStep, TwoModules, arrays, classifier, tuning

BACKEND = "aot_eager"  # compiles as inductor does, without a C++ compiler
ROUNDING = 1e-4  # of float32, over 48 steps


def held_out(rows: int, in_order: bool = False) -> Any:
    """A train_split of digits that are not trained on. in_order: of their labels."""
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    x, y = (a[runs.ROWS : runs.ROWS + rows].numpy() for a in runs.digits())
    order = np.argsort(y, kind="stable") if in_order else slice(None)
    return predefined_split(Dataset(x[order], y[order]))


# ---- what is trained


def test_accumulation_is_tuned_and_says_what_total_steps_should_be() -> None:
    net = classifier(cls=Accumulating, train_split=None)
    with pytest.warns(UserWarning, match=r"10 optimizer steps in an epoch of 20 batches.*total_steps=30"):
        net.fit(*arrays())
    stats = net.tuner_.stats_
    assert (stats["steps"], stats["gradients"], stats["plain_steps"]) == (30, 60, 0)
    told = classifier(cls=Accumulating, tuner=tuning(total_steps=30), train_split=None).fit(*arrays())  # no warning
    assert 0 < told.history[-1, "lr/applied"] < 0.2 * max(told.history[:, "lr/applied"])


def test_a_step_of_the_nets_own_calls_backward_of_the_callback() -> None:
    net, own = classifier().fit(*arrays()), classifier(cls=OwnStep).fit(*arrays())
    assert own.tuner_.stats_ == net.tuner_.stats_ and own.tuner_.stats_["plain_steps"] == 0
    assert own.history[:, "lr/applied"] == net.history[:, "lr/applied"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerates_mixin(accumulate: int, recwarn: pytest.WarningsRecorder) -> None:
    """The same as the net without it; with accumulation, as told by hand how many steps there are."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from skorch import NeuralNetClassifier
    from skorch.hf import AccelerateMixin

    class Accelerated(AccelerateMixin, NeuralNetClassifier):
        pass

    def accelerated(tuner: Any, epochs: int = 3) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)  # one a process
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        return classifier(cls=Accelerated, tuner=tuner, accelerator=accelerator, train_split=None, max_epochs=epochs)

    steps = 3 * 20 // accumulate
    net, told = accelerated(tuning()).fit(*arrays()), accelerated(tuning(total_steps=steps), 1).fit(*arrays())
    told.partial_fit(*arrays()).partial_fit(*arrays())
    for other in [told] if accumulate > 1 else [told, classifier(train_split=None).fit(*arrays())]:
        assert other.history[:, "lr/applied"] == net.history[:, "lr/applied"]
        assert all(map(torch.equal, net.module_.parameters(), other.module_.parameters()))
    assert net.tuner_.stats_["steps"] == steps and net.tuner_.stats_["plain_steps"] == 0
    assert "backward" not in vars(net.accelerator) and [str(w.message) for w in recwarn] == []


@pytest.mark.slow
def test_a_compiled_net_is_tuned_as_it_is_uncompiled() -> None:
    """skorch compiles the criterion too, which is called beside the model."""
    torch._dynamo.reset()
    linear = {"module": nn.Linear, "module__in_features": 64, "module__out_features": 10}
    linear["criterion"] = nn.CrossEntropyLoss  # in a compiled NLLLoss skorch does not see that it needs a logarithm
    plain = classifier(**linear).fit(*arrays())
    net = classifier(compile=True, compile__backend=BACKEND, **linear).fit(*arrays())
    assert hasattr(net.module_, "_orig_mod") and hasattr(net.criterion_, "_orig_mod")
    assert net.tuner_.stats_ == plain.tuner_.stats_ and plain.tuner_.stats_["hessian_products"] > 40
    assert net.history[:, "lr/applied"] == pytest.approx(plain.history[:, "lr/applied"], rel=ROUNDING)
    for p, q in zip(net.module_.parameters(), plain.module_.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=ROUNDING, atol=ROUNDING)


def test_validation_leaves_the_statistics_of_every_module_alone() -> None:
    net = classifier(cls=TwoModules, train_split=None).fit(*arrays())
    assert net.tuner_.stats_["val_evaluations"] > 10 and net.tuner_.stats_["plain_steps"] == 0
    assert net.front_.num_batches_tracked == net.tuner_.stats_["steps"] == 60
    with net.tuner_.tuner_.best() as model:
        assert {name.split(".")[0] for name in model.state_dict()} == {"module", "front"}


class Temperature(nn.Module):
    """A criterion that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x * self.log_t.exp(), y)


def test_a_criterion_with_parameters_is_trained_and_kept() -> None:
    net = classifier(module=Noisy, criterion=Temperature).fit(*arrays())
    assert net.criterion_.log_t.item() != 0
    with net.tuner_.tuner_.best() as model:
        assert "criterion.log_t" in model.state_dict()


class Stream(IterableDataset):
    """Its length is not known."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.int64]]:
        yield from zip(*arrays(), strict=True)


def test_without_a_length_lr_has_no_shape() -> None:
    net = classifier(train_split=None, classes=list(range(10))).fit(Stream(), y=None)
    assert net.tuner_.stats_["steps"] == 60 and net.tuner_.tuner_._loop.total is None
    assert net.history[-1, "lr/applied"] > 100 * 1e-4


# ---- the net's own validation data


def test_without_val_loss_the_nets_own_validation_data_are_read() -> None:
    """As one that is written by hand: without dropout, with BatchNorm's statistics of the batch, and modes put back."""
    x, y = (a[runs.ROWS : runs.ROWS + 128] for a in runs.digits())

    def by_hand(net: Any) -> Tensor:
        net.module_.net[3].eval()  # dropout
        loss = cross_entropy(net.module_(x), y)
        net.module_.net[3].train()
        return loss

    options = {"module": Noisy, "criterion": nn.CrossEntropyLoss, "batch_size": 128, "train_split": held_out(128)}
    one, other = (classifier(tuner=tuning(f), **options).fit(*arrays()) for f in (by_hand, None))
    assert one.tuner_.tuner_.val_loss < 2  # it was learned: log 10 = 2.3
    assert other.tuner_.tuner_.val_loss == pytest.approx(one.tuner_.tuner_.val_loss, rel=ROUNDING)
    assert one.history[:, "valid_loss"] == pytest.approx(other.history[:, "valid_loss"], rel=ROUNDING)


@pytest.mark.parametrize(("rows", "read"), [(600, 256), (65, 64), (20, 20)])
def test_which_rows_are_read(rows: int, read: int) -> None:
    """256 of them, the same each time, from everywhere in the data; batches of one size."""
    from skorch import NeuralNetClassifier

    calls: list[Tensor] = []

    class Noting(NeuralNetClassifier):
        def get_loss(self, y_pred: Any, y: Any, X: Any = None, training: bool = False) -> Tensor:
            if torch.is_grad_enabled() and not training:  # not validation_step's
                calls.append(y)
            return super().get_loss(y_pred, y, X=X, training=training)

    net = classifier(
        cls=Noting,
        tuner=tuning(None),
        max_epochs=1,
        train_split=held_out(rows, in_order=True),
        module=Noisy,
        criterion=nn.CrossEntropyLoss,
    )
    net.fit(*arrays())
    n = -(-read // 32)
    readings = [torch.cat(calls[i : i + n]) for i in range(0, len(calls), n)]
    assert len(readings) > 4 and all(torch.equal(reading, readings[0]) for reading in readings)
    assert len(readings[0]) == read and len(readings[0].unique()) == 10 and len({len(y) for y in calls}) == 1


def test_a_net_without_validation_data_needs_a_val_loss() -> None:
    net = classifier(tuner=tuning(None), train_split=None).initialize()
    before = [p.clone() for p in net.module_.parameters()]
    with pytest.raises(ValueError, match="train_split, or TunerCallback a val_loss"):
        net.partial_fit(*arrays())
    assert all(torch.equal(a, b) for a, b in zip(before, net.module_.parameters(), strict=True))


def test_in_a_pipeline_under_a_grid_search() -> None:
    """Every fit validates on a part of its own fold, scaled as the rest."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net = classifier(tuner=tuning(None), max_epochs=4)
    x, y = arrays()
    grid = {"neuralnetclassifier__module__width": [2, 24], "neuralnetclassifier__callbacks__tuner__every": [5]}
    search = GridSearchCV(make_pipeline(StandardScaler(), net), grid, cv=2, error_score="raise").fit(1e3 * x, y)
    assert search.best_params_["neuralnetclassifier__module__width"] == 24 and search.best_score_ > 0.7
    assert search.best_estimator_[-1].tuner_.stats_["plain_steps"] == 0
