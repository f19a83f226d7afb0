"""The three demonstrations of `tune_run`, in small."""

import json

import numpy as np
import pytest
import torch

from experiments import data_cleaning, datasets, learned_schedule, metalearn_lr, results
from experiments.arguments import parse


def args(module, *words):
    return parse(module.Args, ["--quick", *map(str, words)])


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


def test_metalearn_lr_ends_near_lr_that_was_published_for_it(tmp_path):
    rows = metalearn_lr.main(args(metalearn_lr, "--out", tmp_path))
    assert read(tmp_path, "metalearn_lr") == rows
    ends = results.select(rows, {"kind": "end"})
    assert [row["start"] for row in ends] == [1.5, 0.15]
    for row in ends:
        path = [each for each in rows if each["kind"] == "outer step" and each["start"] == row["start"]]
        assert path[0]["lr"] == row["start"]
        assert row["objective"] == min(each["mean_loss"] for each in path) < path[0]["mean_loss"]
        assert row["mean_loss"] == pytest.approx(row["objective"], rel=1e-5)  # torch's own loop


def test_mnist1d_losses_at_the_published_lr_are_the_published_ones():
    mean_loss, final_loss = metalearn_lr.plain(metalearn_lr.LR, 200)
    assert mean_loss == pytest.approx(metalearn_lr.MEAN_LOSS, abs=1e-3)
    assert final_loss == pytest.approx(metalearn_lr.FINAL_LOSS, abs=1e-3)


def test_learned_schedule_has_grid_and_outer_steps_and_goes_on(stand_in, tmp_path, monkeypatch, capsys):
    words = ("--data-dir", stand_in, "--out", tmp_path)
    rows = learned_schedule.main(args(learned_schedule, *words))
    assert read(tmp_path, "learned_schedule") == json.loads(json.dumps(rows))
    grid = [row for row in rows if row["method"] == "grid"]
    (learned,) = [row for row in rows if row["method"] == "learned"]
    path = [row for row in rows if row["method"] == "outer step"]
    assert len(grid) == 4
    assert learned["val_loss_of_grid"] == min(row["val_loss"] for row in grid if not row["diverged"])
    assert [row["step"] for row in path] == list(range(6))
    knots = [path[0][f"knot_{i}"] for i in range(learned_schedule.KNOTS)]
    assert knots == pytest.approx([learned["start_lr"]] * learned_schedule.KNOTS)
    assert learned["val_loss"] == min(row["value"] for row in path if row["horizon"] == 1)
    monkeypatch.setattr(learned_schedule, "run", lambda *_: pytest.fail("a finished run was run again"))
    again = learned_schedule.main(args(learned_schedule, *words))
    assert [row for row in again if row["method"] != "fresh"] == [row for row in rows if row["method"] != "fresh"]
    assert "within 40" in capsys.readouterr().out


def test_a_learned_schedule_is_that_of_torchs_own_loop(stand_in, tmp_path):
    """The objective of tune_run is the validation loss of `fit` with the same knots."""
    found = learned_schedule.learn(args(learned_schedule, "--data-dir", stand_in), 0.01, tmp_path)
    schedule = learned_schedule.of_knots(found.values["lr_knots"])
    again = learned_schedule.fit(schedule, 1000, 64, str(stand_in))
    assert again["val_loss"] == pytest.approx(found.value, rel=1e-4)


def test_data_cleaning_replaces_labels_and_reports_every_seed(stand_in, tmp_path, capsys):
    pytest.importorskip("sklearn")
    given = args(data_cleaning, "--data-dir", stand_in, "--out", tmp_path)
    rows = data_cleaning.main(given)
    assert read(tmp_path, "data_cleaning") == rows
    (end,) = results.select(rows, {"kind": "end"})
    path = results.select(rows, {"kind": "outer step"})
    assert path[0]["auroc"] == 0.5  # all weights are equal
    assert end["auroc"] > 0.6
    assert end["val_loss"] == min(row["val_loss"] for row in path) < path[0]["val_loss"]
    assert "AUROC" in capsys.readouterr().out

    data = datasets.fashion_mnist(str(stand_in))
    task = data_cleaning.corrupted(data, given, 1000)
    assert int(task.wrong.sum()) == end["wrong"] == 30
    picked = torch.from_numpy(np.random.default_rng(1000).choice(len(data.train.y), 60, replace=False))
    assert torch.equal(data.train.y[picked] != task.train.y, task.wrong)


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (metalearn_lr, ("--outer", "adamw"), "unknown adamw; choose from"),
        (metalearn_lr, ("--steps", 0), "at least 1"),
        (learned_schedule, ("--starts", "flat"), "unknown flat"),
        (learned_schedule, ("--outer-steps", 2), "--outer-steps 3"),
        (data_cleaning, ("--share", 1.5), "between 0 and 1"),
    ],
)
def test_bad_arguments_end_before_any_work(module, words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        module.main(args(module, *words, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
