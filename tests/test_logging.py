"""What a run leaves behind: one TensorBoard run, and the same numbers as JSON lines."""

import importlib
import itertools
import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hypergrad
from hypergrad.logging import short


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
    for step in range(14):
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


def once(scalars):
    """step → value, each step of which is there once."""
    steps = [e.step for e in scalars]
    assert len(steps) == len(set(steps))
    return {e.step: e.value for e in scalars}


def test_scalars_are_those_of_the_json_lines(folder):
    reader = events(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars = [row for row in rows if "loss/val" in row]
    assert [row["step"] for row in scalars] == [10, 12, 14]  # none while lr's start is found
    numbers = {f"{name}/{g}" for name in ("lr_scale", "weight_decay", "momentum") for g in "01"}
    logs = {f"log10_{x}" for x in numbers if not x.startswith("momentum")}
    values = {f"hyper/{x}" for x in numbers | logs}
    expected = values | {f"start/{x}" for x in logs | {"momentum/0", "momentum/1"}}
    expected |= {"lr/applied/0", "lr/applied/1", "loss/train", "loss/val", "loss/val_best"}
    expected |= {f"val_hypergradient/{x}{end}" for x in numbers for end in ("", "_low", "_high")}
    expected |= {f"tangent/{x}" for x in numbers}
    expected |= {f"run/{x}" for x in ("cost_over_plain", "rollbacks", "backtracks", "steps_passed_over", "ms_per_step")}
    assert expected == set(scalars[0]) - {"step"} == set(reader.Tags()["scalars"])
    (begun,) = [row for row in rows if row["step"] == 0 and "note" not in row]
    assert set(begun) == values | {"step"}
    for tag in expected:
        written = once(reader.Scalars(tag))
        of_lines = [begun, *scalars] if tag in values else scalars
        assert written == {row["step"]: pytest.approx(row[tag], rel=1e-6) for row in of_lines}, tag


def test_the_start_is_the_first_point_of_a_curve_and_a_level_line_beside_it(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    begun, *scalars = [row for row in rows if "hyper/lr_scale/0" in row]
    assert (begun["hyper/lr_scale/0"], begun["hyper/lr_scale/1"], begun["hyper/weight_decay/1"]) == (0.01, 0.02, 1e-3)
    assert {row["start/log10_lr_scale/1"] for row in scalars} == {begun["hyper/log10_lr_scale/1"]} == {math.log10(0.02)}
    assert {row["start/momentum/0"] for row in scalars} == {0.5}
    assert all(row["hyper/lr_scale/0"] != 0.01 for row in scalars)  # the warm start's


def test_a_run_that_goes_on_has_no_start(tmp_path):
    def tuner(folder):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        x, y = torch.randn(20, 3), torch.randn(20, 1)
        made = hypergrad.Tuner(
            model, opt, lambda: ((model(x) - y) ** 2).mean(), "lr", every=2, log_dir=tmp_path / folder
        )
        return (made, model, opt), lambda: ((model(x) - y) ** 2).mean()

    states = None
    for folder in ("first", "second"):
        parts, loss = tuner(folder)
        made, _, opt = parts
        if states is not None:
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        for _ in range(4):
            opt.zero_grad()
            made.backward(loss())
            opt.step()
        made.close()
        states = [part.state_dict() for part in parts]
    first, second = ((tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in ("first", "second"))
    steps = [[row["step"] for row in map(json.loads, lines) if "hyper/lr_scale" in row] for lines in (first, second)]
    assert steps == [[0, 2, 4], [6, 8]]
    assert not any("start/log10_lr_scale" in json.loads(line) for line in second)


class Killed(Exception):
    pass


def script(folder, checkpoint, kill_at=None, total=24, every_save=7):
    """A user's script: goes on from its last checkpoint, where there is one; killed after so many steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-4)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    loss = lambda: ((model(x) - y) ** 2).mean()  # noqa: E731
    tuner = hypergrad.Tuner(model, opt, loss, ("lr", "weight_decay"), every=2, total_steps=total, log_dir=folder)
    if checkpoint.exists():
        for part, state in zip((model, opt, tuner), torch.load(checkpoint, weights_only=True), strict=True):
            part.load_state_dict(state)
    for t in range(tuner.stats["steps"], total):
        if t == kill_at:
            tuner._journal.flush()  # what TensorBoard's writer has by then
            raise Killed
        opt.zero_grad()
        tuner.backward(loss())
        opt.step()
        if (t + 1) % every_save == 0 or t + 1 == total:
            torch.save([part.state_dict() for part in (model, opt, tuner)], checkpoint)
    tuner.close()


@pytest.fixture
def seconds_apart(monkeypatch):
    """TensorBoard orders a run's files by the second in which they were made."""
    module = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    ticks = itertools.count(10**9)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: next(ticks)))


@pytest.mark.usefixtures("seconds_apart")
@pytest.mark.parametrize("kills", [(12,), (12, 13, 20), (6,), (1, 12), (15, 22), (14, 15)])
def test_no_step_is_there_twice_after_kills(tmp_path, kills):
    """Rows of a run that was killed and went on are those of one that was not."""
    script(tmp_path / "whole", tmp_path / "whole.pt")
    for at in kills:
        with pytest.raises(Killed):
            script(tmp_path / "run", tmp_path / "run.pt", at)
    script(tmp_path / "run", tmp_path / "run.pt")
    script(tmp_path / "run", tmp_path / "run.pt")  # once more: nothing is left to do

    def rows(folder, name="metrics.jsonl"):
        found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        return [{tag: x for tag, x in row.items() if not tag.startswith("run/ms")} for row in found]

    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert all("start/log10_lr_scale" in row for row in rows(tmp_path / "run") if "loss/val" in row)
    readers = events(tmp_path / "whole"), events(tmp_path / "run")
    for tag in readers[0].Tags()["scalars"]:
        if not tag.startswith("run/ms"):
            whole, run = (once(reader.Scalars(tag)) for reader in readers)
            assert run == whole, tag
    for tag in ("notes/text_summary", "recipe/text_summary"):
        whole, run = (texts(tmp_path / name, tag) for name in ("whole", "run"))
        assert run == whole and len(run) > 0, tag


def texts(folder, tag):
    """What TensorBoard's own server shows: the reader of `events` hides scalars only."""
    reader = importlib.import_module("tensorboard.backend.event_processing.plugin_event_accumulator")
    run = reader.EventAccumulator(str(folder))
    run.Reload()
    return [(e.step, e.tensor_proto.string_val[0]) for e in run.Tensors(tag)]


def test_a_row_torn_by_a_kill_is_dropped(tmp_path):
    with pytest.raises(Killed):
        script(tmp_path / "run", tmp_path / "run.pt", 12)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "loss')
    script(tmp_path / "run", tmp_path / "run.pt")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 24


@pytest.mark.usefixtures("seconds_apart")
def test_a_run_that_begins_anew_puts_the_rows_of_an_earlier_one_aside(tmp_path):
    script(tmp_path / "run", tmp_path / "first.pt")
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    script(tmp_path / "run", tmp_path / "second.pt", total=12)
    assert (tmp_path / "run" / "metrics.1.jsonl").read_text() == first
    second = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in second if "loss/val" in row] == [2, 4, 6, 8, 10, 12]
    assert [*once(events(tmp_path / "run").Scalars("loss/val"))] == [2, 4, 6, 8, 10, 12]


def test_the_lr_that_was_used_stands_beside_its_scale(tmp_path):
    """With total_steps: lr/applied is hyper/lr_scale, before its last move, times the shape."""
    rows = []
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(20, 3)
    loss = lambda: (model(x) ** 2).mean()  # noqa: E731
    tuner = hypergrad.Tuner(
        model,
        opt,
        loss,
        "lr",
        every=1,
        total_steps=50,
        warm_start=False,
        on_log=lambda row, step: rows.append((step, row)),
    )
    for _ in range(20):
        opt.zero_grad()
        tuner.backward(loss())
        opt.step()
    pairs = itertools.pairwise(rows)
    assert [now["lr/applied"] for _, (_, now) in pairs] == [
        pytest.approx(before["hyper/lr_scale"] * (50 - step) / 50, rel=1e-12) for step, before in rows[:-1]
    ]
    assert len({row["hyper/lr_scale"] for _, row in rows}) > 10


def test_custom_scalars_show_a_run_on_one_page(folder):
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    reader = events(folder)
    (event,) = reader.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    there = set(reader.Tags()["scalars"])
    lines, bands = {}, {}
    for category in page.category:
        for chart in category.chart:
            lines[chart.title] = {t for t in there for pattern in chart.multiline.tag if re.match(pattern, t)}
            for each in chart.margin.series:
                bands[chart.title] = each.value, each.lower, each.upper
            assert len(lines[chart.title]) == len(chart.multiline.tag)  # each names a tag that is there
    assert lines["log10 lr_scale"] == {f"{kind}/log10_lr_scale/{g}" for kind in ("hyper", "start") for g in "01"}
    assert lines["momentum"] == {f"{kind}/momentum/{g}" for kind in ("hyper", "start") for g in "01"}
    assert len(bands) == 6
    assert bands["lr_scale/0"] == tuple(f"val_hypergradient/lr_scale/0{end}" for end in ("", "_low", "_high"))
    assert all(there.issuperset(band) for band in bands.values())
    shown = set().union(*lines.values(), *bands.values())
    assert there - shown == {f"hyper/{n}/{g}" for n in ("lr_scale", "weight_decay") for g in "01"} | {"run/ms_per_step"}


def test_a_lone_groups_number_is_left_out():
    assert short(["lr/0", "weight_decay/0", "weight_decay/1", "betas/0/0"]) == [
        "lr",
        "weight_decay/0",
        "weight_decay/1",
        "betas/0/0",
    ]


def test_noise_bands_hold_the_mean_and_the_cost_counts_products(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss/val" in row][-1]
    for x in ("lr_scale/0", "weight_decay/1"):
        of = f"val_hypergradient/{x}"
        assert last[f"{of}_low"] <= last[of] <= last[f"{of}_high"]
        assert last[f"tangent/{x}"] > 0
    assert last["run/steps_passed_over"] == 1
    assert 1 < last["run/cost_over_plain"] < 20  # six numbers are tuned at once


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
def test_the_cost_is_in_gradients_of_a_plain_run(mode):
    """Which accumulates as many as the tuned one; modes that replay steps count a step's own gradient too."""

    def cost(accumulated):
        torch.manual_seed(0)
        model, rows = nn.Linear(3, 1), []
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        x, y = torch.randn(20, 3), torch.randn(20, 1)

        def loss(model, batch):
            return ((model(batch[0]) - batch[1]) ** 2).mean()

        def val_loss():
            return loss(model, (x, y))

        made = hypergrad.Tuner(
            model, opt, val_loss, "lr", loss=loss, mode=mode, every=10, horizon=10, warm_start=False, cost=None,
            on_log=lambda row, t: rows.append(row),
        )  # fmt: skip
        for _ in range(100):
            if mode != "forward":
                made.step((x, y))
                continue
            opt.zero_grad()
            for _ in range(accumulated):
                made.backward(loss(model, (x, y)) / accumulated)
            opt.step()
        return rows[-1]["run/cost_over_plain"]

    if (
        mode == "forward"
    ):  # the gradient, a product in all steps but the first, and a validation loss in one of ten, once two
        assert cost(1) == pytest.approx(1 + 2 * 0.99 + 0.11)
        assert cost(4) == pytest.approx(1 + 2 * 0.99 + 0.11 / 4)
    else:
        assert cost(1) > 2


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
    assert len(said) == 5
    (recipe,) = [row["recipe"] for row in notes if "recipe" in row]
    assert "optimizer = torch.optim.SGD([" in recipe
    assert said[:2] == ["momentum/0 starts from 0.9.", "momentum/1 starts from 0.9."]
    assert "not finite" in said[2]
    assert said[3].startswith("lr starts from")
    end = r"validation loss at the end [\d.]+, best [\d.]+ at step \d+ \(tuner.best\(\) has those weights\)\."
    assert re.fullmatch(end, said[4])
    reader = events(folder)
    assert "notes/text_summary" in reader.Tags()["tensors"]
    (page,) = reader.Tensors("recipe/text_summary")
    assert page.tensor_proto.string_val[0].decode() == f"```python\n{recipe}\n```" and page.step == 14


def test_every_tag_is_explained(folder):
    """docs/tensorboard.md has a row for each: NAME stands for a number, behind log10_ too, and with its param group."""
    page = (Path(__file__).parents[1] / "docs/tensorboard.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    patterns = [tag.replace("NAME", r"\w+(/\d+)?") for row in rows for tag in re.findall(r"`([\w/]+)`", row)]
    tags = events(folder).Tags()["scalars"]
    assert len(tags) > 30
    assert [tag for tag in tags if not any(re.fullmatch(p + r"(/\d+)?", tag) for p in patterns)] == []
