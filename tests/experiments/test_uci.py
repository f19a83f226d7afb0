import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments import datasets, uci
from experiments.arguments import parse

SPLIT, FEATURES = (40, 12, 10), 3
REAL = Path("data/uci")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The three sets, small and made up: y = 5 + 20 tanh of a sum of x, in rows in order."""
    rng = np.random.default_rng(0)
    for name in datasets.UCI_SETS:
        x = rng.normal(3, 2, size=(sum(SPLIT), FEATURES))
        np.savez(tmp_path / f"{name}.npz", x=x, y=5 + 20 * np.tanh(x.sum(1) - 9), split=np.array(SPLIT))
    return tmp_path


def args(*words: object) -> uci.Args:
    return parse(uci.Args, [str(word) for word in words])


def test_a_set_is_standardised_by_training_and_validation_rows(folder):
    data, y_std = datasets.uci("energy", folder)
    raw = np.load(folder / "energy.npz")
    assert [tuple(split.x.shape) for split in data] == [(n, FEATURES) for n in SPLIT]
    seen = torch.cat([data.train.x, data.val.x])
    torch.testing.assert_close(seen.mean(0), torch.zeros(FEATURES), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(FEATURES), atol=1e-6, rtol=0)
    assert y_std == pytest.approx(raw["y"][:52].std())
    restored = y_std * data.test.y.numpy() + raw["y"][:52].mean()  # rows in order, test rows last
    np.testing.assert_allclose(restored, raw["y"][52:], rtol=1e-5)


@pytest.mark.skipif(not REAL.is_dir(), reason="the UCI sets are not in data/uci")
@pytest.mark.parametrize(("name", "shape"), [("energy", (614, 8)), ("kin8nm", (5898, 8)), ("power", (6889, 4))])
def test_the_sets_are_those_of_the_protocol(name, shape):
    assert datasets.uci(name, REAL)[0].train.x.shape == shape


def test_sets_that_are_missing_or_torn_are_said(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"energy.npz was not found. Pass --data-dir .* x \[n, d\], y \[n\] and split"):
        uci.main(args("--data-dir", tmp_path / "nowhere", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    np.savez(folder / "energy.npz", x=np.zeros((9, 3)), y=np.zeros(9), split=np.array([5, 3, 2]))
    with pytest.raises(ValueError, match="does not add up to the 9 rows"):
        datasets.uci("energy", folder)


def test_the_model_on_columns_is_the_usual_one_on_rows(folder):
    """Same initialisation, same function, same SGD steps as nn.Sequential with mse_loss."""
    data, _ = uci.load("energy", str(folder))
    hyper = {"lr": 0.05, "momentum": 0.8, "weight_decay": 1e-2}
    ours, _ = uci.fit(data, "untuned", hyper, seed=5, steps=20)
    torch.manual_seed(5)
    usual = nn.Sequential(nn.Linear(FEATURES, 50), nn.ReLU(), nn.Linear(50, 1))
    optimizer = torch.optim.SGD(usual.parameters(), **hyper)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(usual(data.train.x.t()).flatten(), data.train.y).backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_command_runs_grid_and_starts_and_is_not_run_twice(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ("--steps", 20, "--starts", 2, "--jobs", 1, "--sets", "power", "--data-dir", folder, "--out", out)
    monkeypatch.setitem(uci.GRID, "lr", (1e-3, 0.1, 1e6))  # the last one diverges
    rows = uci.main(args(*words))
    assert len(rows) == 8

    of_grid = json.loads((out / "uci_grid.json").read_text())["rows"]
    assert [sum(row["method"] == kind for row in of_grid) for kind in ("grid", "winner")] == [24, 10]
    assert sum(row["diverged"] for row in of_grid) == 8
    least = min((row for row in of_grid if row["method"] == "grid" and not row["diverged"]), key=lambda r: r["val_mse"])
    fresh = [row for row in of_grid if row["method"] == "winner"]
    assert all(row[name] == least[name] for row in fresh for name in uci.GRID)
    assert least["seed"] not in {row["seed"] for row in fresh}
    bar = np.mean([row["test_mse"] for row in fresh])
    for row in rows:
        assert row["diverged"] or row["ratio"] == pytest.approx(row["test_mse"] / bar)
    assert {row["method"] for row in rows} == {"untuned", "untuned_decay", "tuned", "tuned_momentum"}
    assert all(row["end_lr"] == row["start_lr"] for row in rows if row["method"] == "untuned")
    result = json.loads((out / "uci.json").read_text())
    assert result["rows"] == rows
    assert str(tmp_path) not in result["command"]

    monkeypatch.setattr(uci, "fit", lambda *_: pytest.fail("a finished run was run again"))
    assert uci.main(args(*words)) == rows
    assert uci.main(args(*words, "--methods", "tuned")) == rows  # the bar is read from the file
    assert "worst/bar" in capsys.readouterr().out


def test_errors_are_in_original_units(folder):
    item = {"set": "power", "method": "untuned", "seed": 0, "steps": 1}
    row = uci.run(item, str(folder))
    model, _ = uci.fit(uci.load("power", str(folder))[0], "untuned", uci.start(0), 0, 1)
    raw = np.load(folder / "power.npz")
    y, y_std, y_mean = raw["y"], raw["y"][:52].std(), raw["y"][:52].mean()
    with torch.no_grad():
        predicted = y_std * model(uci.load("power", str(folder))[0].test.x).numpy() + y_mean
    assert row["test_mse"] == pytest.approx(((predicted - y[52:]) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "turned"), "unknown turned: --methods grid untuned"),
        (("--methods", "winner"), "unknown winner"),
        (("--sets", "yacht"), "unknown yacht"),
        (("--starts", "0"), "at least 1"),
    ],
)
def test_bad_arguments_end_before_any_work(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        uci.main(args(*words, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
