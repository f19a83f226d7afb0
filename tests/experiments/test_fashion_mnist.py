import copy
import json
import math

import pytest
import torch

from experiments import datasets, fashion_mnist, flops
from experiments.arguments import parse

FIELDS = {  # what the issue asks of a row
    "seed",
    "start_lr",
    "start_weight_decay",
    "start_momentum",
    "method",
    "steps",
    "val_loss",
    "test_loss",
    "diverged",
    "flops_ratio",
    "seconds",
}


def args(*words: str) -> fashion_mnist.Args:
    return parse(fashion_mnist.Args, list(words))


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_starts_are_drawn_as_the_protocol_says_and_do_not_depend_on_their_number():
    starts = [fashion_mnist.start(seed) for seed in range(400)]
    for name, low, high in (("lr", -6, -1), ("weight_decay", -7, -2)):
        logs = torch.tensor([math.log10(start[name]) for start in starts])
        assert low <= logs.min() < low + 0.1 < high - 0.1 < logs.max() <= high
        assert abs(logs.mean() - (low + high) / 2) < 0.25  # three standard errors of a uniform mean
    assert all(0 <= start["momentum"] <= 1 for start in starts)
    assert fashion_mnist.start(7) == starts[7]


def test_a_sweep_writes_rows_and_a_result_and_is_not_run_twice(stand_in, tmp_path, monkeypatch, capsys):
    methods = ("--methods", "untuned", "untuned_decay", "tuned")
    words = (*methods, "--starts", "2", "--steps", "30", "--jobs", "1")
    words += ("--data-dir", str(stand_in), "--out", str(tmp_path))
    rows = fashion_mnist.main(args(*words))
    assert len(rows) == 6
    for row in rows:
        assert set(row) >= FIELDS
        assert row["seconds"] > 0
        assert row["diverged"] is (row["test_loss"] is None)
    tuned = [row for row in rows if row["method"] == "tuned"]
    assert all(row["flops_ratio"] > 1 and row["gradient_evaluations"] > 30 for row in tuned)
    assert all(row["flops_ratio"] == 1 for row in rows if row["method"] == "untuned")
    assert {row["method"] for row in rows if "averaged_test_loss" in row} == {"tuned"}
    assert not any("replay_test_loss" in row for row in rows)
    result = json.loads((tmp_path / "fashion_mnist.json").read_text())
    assert result["rows"] == rows
    assert str(tmp_path) not in result["command"]

    monkeypatch.setattr(fashion_mnist, "fit", lambda *_: pytest.fail("a finished start was run again"))
    assert fashion_mnist.main(args(*words)) == rows
    assert "tuned" in capsys.readouterr().out


def test_test_loss_is_that_of_the_whole_set_at_the_last_weights(stand_in):
    data = datasets.fashion_mnist(str(stand_in))
    model = torch.nn.Linear(784, 10)
    by_hand = torch.stack(
        [torch.nn.functional.cross_entropy(model(x)[None], y[None]) for x, y in zip(data.test.x, data.test.y)]
    )
    assert fashion_mnist.whole_loss(model, data.test) == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_a_run_is_the_same_every_time(stand_in):
    data = datasets.fashion_mnist(str(stand_in))
    once, again = (fashion_mnist.fit(data, "tuned", 3, 40) for _ in range(2))
    assert {**once.row, "seconds": 0} == {**again.row, "seconds": 0}
    assert same(once.model, again.model)
    assert once.values == again.values


def test_an_untuned_run_is_plain_sgd(stand_in):
    data, hyper = datasets.fashion_mnist(str(stand_in)), fashion_mnist.start(5)
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(784, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
    optimizer = torch.optim.SGD(model.parameters(), **hyper)
    order = torch.randperm(500)
    for batch in order[:200].split(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.train.x[batch]), data.train.y[batch]).backward()
        optimizer.step()
    assert same(model, fashion_mnist.fit(data, "untuned", 5, 4).model)


def test_the_values_of_a_tuned_run_and_plain_sgd_give_its_weights_and_their_average(stand_in):
    """So what is recorded is what each step used, and the grid's average is the tuner's."""
    data = datasets.fashion_mnist(str(stand_in))
    tuned = fashion_mnist.fit(data, "tuned", 3, 60)
    assert len(tuned.values) == 60
    assert len({values["lr"] for values in tuned.values}) == 60  # warm start, warm-up, decay
    model = fashion_mnist.network(3, data.train.x)
    average, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    fashion_mnist.train(data.train, model, optimizer, 60, plan=tuned.values.__getitem__, average=average)
    assert same(model, tuned.model)
    assert not same(average, model)
    for p, q in zip(average.parameters(), tuned.average.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_replay_is_of_training_and_validation_images(stand_in):
    """A fixed setting, replayed, is a plain run on a set whose training part is both."""
    data, fixed = datasets.fashion_mnist(str(stand_in)), {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
    both = data._replace(train=datasets.Split(*(torch.cat(parts) for parts in zip(data.train, data.val))))
    assert len(both.train.y) == 600
    plain = fashion_mnist.fit(both, "grid", 4, 25, fixed)
    again = fashion_mnist.replay(data, 4, fashion_mnist.fit(data, "grid", 4, 25, fixed).values)
    assert same(again, plain.model)
    assert plain.values[-1] == {"lr": pytest.approx(0.01 / 25), "momentum": 0.9, "weight_decay": 1e-3}


@pytest.mark.slow
def test_grid_winner_and_replays_are_rows_and_paths_a_file_of_their_own(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "GRID", {"lr": (1e-4, 0.03), "momentum": (0.0, 0.9), "weight_decay": (1e-3,)})
    words = ("--methods", "grid", "tuned", "--starts", "2", "--steps", "80", "--jobs", "1", "--data-dir", str(stand_in))
    words += ("--out", str(tmp_path))
    before = fashion_mnist.main(args(*words))
    rows = fashion_mnist.main(args(*words, "--replay"))
    assert len(rows) == len(before) == 4 + 10 + 2  # a run made again counts once
    of_grid = [row for row in rows if row["method"] == "grid"]
    won = min(of_grid, key=lambda row: row["val_loss"])
    fresh = [row for row in rows if row["method"] == "winner"]
    assert [row["seed"] for row in fresh] == list(fashion_mnist.FRESH_SEEDS)
    assert all(row[name] == won[name] for row in fresh for name in fashion_mnist.GRID)
    assert all(row["averaged_test_loss"] != row["test_loss"] for row in rows)
    assert {row["method"] for row in rows if "replay_test_loss" in row} == {"winner", "tuned"}
    unmoved = ("test_loss", "averaged_test_loss", "end_lr")
    assert [[row[name] for name in unmoved] for row in rows] == [[row[name] for name in unmoved] for row in before]
    assert fashion_mnist.main(args(*words)) == rows  # one that was replayed need not be run without

    assert all(isinstance(value, str | int | float) for row in rows for value in row.values())
    points = json.loads((tmp_path / "fashion_mnist_paths.json").read_text())["rows"]
    tuned = [row for row in rows if row["method"] == "tuned"]
    assert {(point["method"], point["seed"]) for point in points} == {("tuned", row["seed"]) for row in tuned}
    for row in tuned:
        own = [point for point in points if point["seed"] == row["seed"]]
        steps = [point["step"] for point in own]
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, 80)
        assert 40 < len(steps) <= fashion_mnist.POINTS + 1
        for name in fashion_mnist.VALUES:
            assert own[0][name] == pytest.approx(row[f"start_{name}"], rel=1e-3)
        assert own[-1]["weight_decay"] == pytest.approx(row["end_weight_decay"], rel=1e-3)


def test_the_cost_ratio_counts_training_alone(stand_in):
    """A plain step is 2 products with the first layer's weights (images need no gradient), and 3 with the second's."""
    data = datasets.fashion_mnist(str(stand_in))
    step = 2 * fashion_mnist.BATCH * (2 * 784 * 50 + 3 * 50 * 10)
    assert flops.count(lambda: fashion_mnist.fit(data, "untuned", 0, 5)) == 5 * step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "turned"), "unknown turned; choose from grid, untuned"),
        (("--methods", "winner"), "unknown winner"),
        (("--starts", "0"), "at least 1"),
        (("--data-dir", "nowhere"), "was not found"),
    ],
)
def test_bad_arguments_end_before_any_work(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        fashion_mnist.main(args(*words, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(SystemExit, match="no GPU"):
        fashion_mnist.main(args("--device", "cuda"))
