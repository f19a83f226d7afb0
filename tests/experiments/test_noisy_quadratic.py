import json

import numpy as np
import pytest
import torch

from experiments import noisy_quadratic
from experiments.arguments import parse
from experiments.noisy_quadratic import Model, Quadratic, best, expected, fit

PUBLISHED = Quadratic(1.0, 1.0, 2000)
SHORT = Quadratic(1.0, 1.0, 100)


@pytest.mark.parametrize(("decay", "loss"), [(False, 0.496), (True, 0.287)])
def test_best_fixed_settings_are_the_published_ones(decay, loss):
    assert best(PUBLISHED, decay)[1] == pytest.approx(loss, rel=0.005)  # to the digits published


def test_the_best_is_no_worse_than_a_fine_grid():
    for decay in (False, True):
        fine = expected(SHORT, np.geomspace(1e-3, 10, 400).tolist(), decay).min()
        assert best(SHORT, decay)[1] <= fine


@pytest.mark.parametrize("method", ["untuned", "best_decay"])
def test_simulated_runs_have_the_loss_of_the_closed_form(method):
    """To four standard errors of the mean of the runs, which are small beside it."""
    losses = [fit(SHORT, seed, 0.1, method)[1]["final_loss"] for seed in range(30)]
    (mean,) = expected(SHORT, [0.1], method == "best_decay")
    assert abs(np.mean(losses) - mean) < 4 * np.std(losses) / np.sqrt(len(losses)) < 0.25 * mean


def test_a_batch_has_the_curvatures_and_the_noise_of_the_paper():
    torch.manual_seed(0)
    problem = Quadratic(0.5, 0.3, 10)
    model = Model(problem)
    (g,) = torch.autograd.grad(model(), [model.theta], create_graph=True)
    v = torch.randn(noisy_quadratic.DIM)
    torch.testing.assert_close(torch.autograd.grad(g, [model.theta], v)[0], model.h * v)

    draws = 400
    noise = torch.stack([torch.autograd.grad(model(), [model.theta])[0] for _ in range(draws)]) - model.h * model.theta
    scaled = noise.detach() / (problem.s2 * model.h).sqrt()  # standard normal
    assert abs(scaled.mean()) < 4 / (draws * noisy_quadratic.DIM) ** 0.5
    assert scaled.var(0).mean().item() == pytest.approx(1, abs=0.02)


def test_a_run_is_the_same_every_time_and_takes_other_options():
    (once, row), (again, row_again) = (fit(SHORT, 3, 1e-3) for _ in range(2))
    assert {**row, "seconds": 0} == {**row_again, "seconds": 0}
    assert torch.equal(once.theta, again.theta)
    with pytest.raises(ValueError, match="every"):
        fit(SHORT, 3, 1e-3, every=0)


def test_the_quick_command_writes_a_row_a_problem(tmp_path, capsys):
    words = ["--quick", "--shorter", "50", "--jobs", "1", "--methods", "tuned", "best_decay", "--out", str(tmp_path)]
    rows = noisy_quadratic.main(parse(noisy_quadratic.Args, words))
    assert len(rows) == 12 == len({(row["p"], row["s2"], row["T"], row["method"]) for row in rows})
    for row in rows:
        assert row["ratio"] == row["final_loss"] / row["best_decay_loss"]
        assert row["best_decay_loss"] < row["best_constant_loss"]
    result = json.loads((tmp_path / "noisy_quadratic.json").read_text())
    assert result["rows"] == rows
    assert str(tmp_path) not in result["command"]
    assert "mean ratio" in capsys.readouterr().out


def test_a_run_that_diverged_counts_as_infinite():
    assert noisy_quadratic.ratio([{"ratio": 1.0, "diverged": False}, {"ratio": None, "diverged": True}]) == float("inf")


@pytest.mark.parametrize(
    ("words", "message"), [(("--methods", "turned"), "unknown turned"), (("--seeds", "0"), "at least 1")]
)
def test_bad_arguments_end_before_any_work(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        noisy_quadratic.main(parse(noisy_quadratic.Args, [*words, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
