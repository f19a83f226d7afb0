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


def test_starts_are_drawn_as_the_protocol_says_and_do_not_depend_on_their_number():
    starts = [fashion_mnist.start(seed) for seed in range(400)]
    for name, low, high in (("lr", -6, -1), ("weight_decay", -7, -2)):
        logs = torch.tensor([math.log10(start[name]) for start in starts])
        assert low <= logs.min() < low + 0.1 < high - 0.1 < logs.max() <= high
        assert abs(logs.mean() - (low + high) / 2) < 0.25  # three standard errors of a uniform mean
    assert all(0 <= start["momentum"] <= 1 for start in starts)
    assert fashion_mnist.start(7) == starts[7]


def test_a_sweep_writes_rows_and_a_result_and_is_not_run_twice(stand_in, tmp_path, monkeypatch, capsys):
    words = ("--starts", "2", "--steps", "30", "--jobs", "1", "--data-dir", str(stand_in), "--out", str(tmp_path))
    rows = fashion_mnist.main(args(*words))
    assert len(rows) == 6
    for row in rows:
        assert set(row) >= FIELDS
        assert row["seconds"] > 0
        assert row["diverged"] is (row["test_loss"] is None)
    tuned = [row for row in rows if row["method"] == "tuned"]
    assert all(row["flops_ratio"] > 1 and row["gradient_evaluations"] > 30 for row in tuned)
    assert all(row["flops_ratio"] == 1 for row in rows if row["method"] == "untuned")
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
    (once, row), (again, row_again) = (fashion_mnist.fit(data, "tuned", 3, 40) for _ in range(2))
    assert {**row, "seconds": 0} == {**row_again, "seconds": 0}
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), again.parameters()))


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
    same, _ = fashion_mnist.fit(data, "untuned", 5, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters()))


def test_the_cost_ratio_counts_training_alone(stand_in):
    """A plain step is 2 products with the first layer's weights (images need no gradient), and 3 with the second's."""
    data = datasets.fashion_mnist(str(stand_in))
    step = 2 * fashion_mnist.BATCH * (2 * 784 * 50 + 3 * 50 * 10)
    assert flops.count(lambda: fashion_mnist.fit(data, "untuned", 0, 5)) == 5 * step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "turned"), "unknown turned; choose from untuned"),
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
