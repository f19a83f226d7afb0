"""What a run leaves behind: one TensorBoard run, and the same numbers as JSON lines."""

import json
import warnings

import pytest
import torch
from torch import nn

import hypergrad


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The log folder of a short run with two param groups and an event worth a note."""
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
    opt = torch.optim.SGD(groups, lr=0.01, momentum=0.5, weight_decay=1e-3)
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    mse = lambda: ((model(x) - y) ** 2).mean()  # noqa: E731
    tuner = hypergrad.Tuner(model, opt, mse, tune=("lr", "weight_decay", "momentum"), every=2, seed=3, log_dir=path)
    for step in range(8):
        opt.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner.backward(mse() * (float("nan") if step == 3 else 1))
            opt.step()
    tuner.close()
    tuner.close()  # twice is once
    return path


def events(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return reader


def test_scalars_are_those_of_the_json_lines(folder):
    reader = events(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars = [row for row in rows if "loss/val" in row]
    assert [row["step"] for row in scalars] == [2, 4, 6, 8]
    expected = {"loss/train", "loss/val", "time/step_ms"}
    expected |= {
        f"{kind}/{name}/{g}"
        for kind in ("hyper", "hypergrad")
        for name in ("lr", "weight_decay", "momentum")
        for g in "01"
    }
    expected |= {f"log10/{name}/{g}" for name in ("lr", "weight_decay") for g in "01"}
    numbers = {f"{name}/{g}" for name in ("lr", "weight_decay", "momentum") for g in "01"}
    expected |= {f"band/{x}/{part}" for x in numbers for part in ("mean", "low", "high")} | {
        f"tangent/{x}" for x in numbers
    }
    expected |= {"cost/gradients_per_step", "events/rollbacks", "events/steps_passed_over"}
    assert expected == set(scalars[0]) - {"step"} == set(reader.Tags()["scalars"])
    for tag in expected:
        written = {e.step: e.value for e in reader.Scalars(tag)}
        assert written == {row["step"]: pytest.approx(row[tag], rel=1e-6) for row in scalars}, tag


def test_noise_bands_hold_the_mean_and_the_cost_counts_products(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss/val" in row][-1]
    for x in ("lr/0", "weight_decay/1"):
        assert last[f"band/{x}/low"] <= last[f"band/{x}/mean"] <= last[f"band/{x}/high"]
        assert last[f"tangent/{x}"] > 0
    assert last["events/steps_passed_over"] == 1
    assert 1 < last["cost/gradients_per_step"] < 20  # six numbers are tuned at once


def test_hparams_are_in_the_same_run(folder):
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    reader = events(folder)
    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin.HParamsPluginData.FromString(content).session_start_info.hparams
    assert start["lr/0 start"].number_value == pytest.approx(0.01)
    assert start["lr/1 start"].number_value == pytest.approx(0.02)
    assert start["optimizer"].string_value == "SGD"
    assert start["seed"].number_value == 3
    assert [p for p in folder.iterdir() if p.is_dir()] == []  # no second run


def test_what_happened_is_said_in_both(folder):
    notes = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [row["note"] for row in notes if "note" in row]
    assert len(said) == 2
    assert said[0].startswith("lr starts from")
    assert "not finite" in said[1]
    assert "notes/text_summary" in events(folder).Tags()["tensors"]
