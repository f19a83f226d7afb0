import math

import pytest
import torch

from experiments import datasets
from experiments.workloads import COMPARED, FAMILIES, RUNGS, WORKLOADS, fit, train, train_tuned

STEPS = 16  # a rung at step 1, 2, 4, 8 and 16
SAME = {"seconds": 0}


SIZED = [pytest.param(name, marks=pytest.mark.slow if name in FAMILIES["realistic"] else ()) for name in WORKLOADS]


@pytest.fixture(params=SIZED)
def workload(request):
    if request.param.endswith("fashion"):
        try:
            datasets.find_fashion_mnist(download=False)
        except FileNotFoundError:
            pytest.skip("Fashion-MNIST is not on this machine")
    return WORKLOADS[request.param]


def test_every_optimizer_is_in_two_workloads_or_more():
    optimizers = [workload.optimizer for workload in WORKLOADS.values()]
    assert all(optimizers.count(name) >= 2 for name in ("SGD", "AdamW", "RMSprop"))
    assert [workload.name for workload in WORKLOADS.values()] == list(WORKLOADS)


def test_a_plain_run_lowers_the_loss_and_is_the_same_every_time(workload):
    lr = 0.02 if workload.optimizer == "SGD" else 0.003
    steps = (
        3 * STEPS if workload.name == "resnet_fashion" else STEPS
    )  # BatchNorm's running statistics take some tens of steps
    once = train(workload.build(3, steps=steps), lr, 1e-4, initial=True)
    if workload.name != "random_labels":  # nothing to learn there
        assert once["test"] < once["initial_test"] and once["val"] < once["initial_val"]
    assert train(workload.build(3, steps=steps), lr, 1e-4, initial=True) | SAME == once | SAME
    assert train(workload.build(4, steps=STEPS), lr, 1e-4)["test"] != once["test"]
    assert set(RUNGS) < set(once)


@pytest.mark.slow
def test_a_tuned_run_moves_lr_in_every_group(workload):
    task = workload.build(0, steps=STEPS)
    row = train_tuned(task, 1e-4, 1e-4, every=2)
    assert all(math.isfinite(x) for x in row.values())
    assert row["end_lr"] != 1e-4
    assert row["gradient_evaluations"] > STEPS
    assert train_tuned(workload.build(0, steps=STEPS), 1e-4, 1e-4, every=2) | SAME == row | SAME


@pytest.mark.slow
def test_the_larger_version_trains_too(workload):
    small, large = workload.build(0), workload.build(0, full=True)
    assert large.steps > small.steps
    assert len(large.data.train.y) >= len(small.data.train.y)
    large.loss(large.model, next(large.batches())).backward()
    assert large.val_loss().isfinite()


def test_splits_do_not_change_and_do_not_meet(workload):
    data = workload.build(0).data
    assert data is workload.build(1).data
    rows = [{x.numpy().tobytes() for x in split.x} for split in data]
    # a text repeats its ruled lines, 4 % of the windows, 6 % of those of 20 kB
    assert all(len(rows[a] & rows[b]) <= 0.06 * len(rows[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_building_and_evaluating_leave_random_numbers_and_modes_alone(workload):
    before = torch.get_rng_state()
    task = workload.build(0)
    weights = [value.clone() for value in task.model.state_dict().values()]
    task.evaluate("val")
    assert torch.equal(before, torch.get_rng_state())
    assert task.model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, task.model.state_dict().values()))


def test_evaluation_is_the_loss_of_the_whole_split():
    task = WORKLOADS["mlp_mnist1d"].build(0)
    assert len(task.data.test.y) > 2500  # several passes
    assert task.evaluate("test") == pytest.approx(task.loss(task.model, task.data.test).item(), rel=1e-5)


def test_an_epoch_has_every_example_once():
    task = WORKLOADS["friedman"].build(0, steps=10)
    assert len(task.data.train.y) == 10 * task.workload.batch
    seen = torch.cat([x for x, _ in task.batches()])
    assert {x.numpy().tobytes() for x in seen} == {x.numpy().tobytes() for x in task.data.train.x}


def test_lr_decays_to_zero_or_stays(monkeypatch):
    used, step = [], torch.optim.SGD.step

    def noted(self):
        used.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(WORKLOADS["diabetes"].build(0, steps=4), 0.1, 0.0)
    train(WORKLOADS["diabetes"].build(0, steps=2), 0.1, 0.0, decay=False)
    assert used == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.1, 0.1])


def test_a_plain_run_that_is_lost_ends_and_one_that_may_come_back_goes_on():
    lost = train(WORKLOADS["diabetes"].build(0, steps=200), 1e6, 1e-4)
    assert math.isnan(lost["val"]) and math.isnan(lost["test"])
    task = WORKLOADS["diabetes"].build(0, steps=200)
    steps = []
    fit(task, task.make_optimizer(1e6, 1e-4), torch.Tensor.backward, lambda: steps.append(1), to_the_end=True)
    assert len(steps) == 200


def test_ratings_decay_users_and_items_apart():
    task = WORKLOADS["matrix_factorisation"].build(0)
    groups = task.make_optimizer(0.1, 0.01).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert [len(group["params"][0]) for group in groups] == [400, 200]


def test_muon_takes_hidden_weights_and_adamw_the_rest():
    task = WORKLOADS["muon_mnist1d"].build(0)
    muon, adamw = task.make_optimizers(0.1, 0.01)
    held = [[tuple(p.shape) for p in opt.param_groups[0]["params"]] for opt in (muon, adamw)]
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    assert held == [[(64, 40), (64, 64)], [(64,), (64,), (10, 64), (10,)]]
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == 0.1


def test_lr_of_both_optimizers_decays(monkeypatch):
    used = []
    for kind in (torch.optim.Muon, torch.optim.AdamW):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, step=step: used.append(self.param_groups[0]["lr"]) or step(self))
    train(WORKLOADS["muon_mnist1d"].build(0, steps=2), 0.1, 0.0)
    assert used == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_what_is_compared_has_rivals_of_its_optimizer():
    assert len(COMPARED) == 12 and {WORKLOADS[name].optimizer for name in COMPARED} == {"SGD", "AdamW", "RMSprop"}


def test_gpt_does_not_see_the_future():
    task = WORKLOADS["char_gpt"].build(0)
    codes = task.data.val.x[:2].clone()
    before = task.model(codes)
    codes[:, 20:] = (codes[:, 20:] + 1) % 90
    after = task.model(codes)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20], after[:, 20])
