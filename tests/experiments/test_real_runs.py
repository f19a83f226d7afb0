"""`experiments.resnet` and `experiments.gpt`: their quick forms, which runs are made, and what a limit of time leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import datasets, gpt, real_runs, resnet
from experiments.arguments import parse
from experiments.sweep import finished

ORDER = ["default", "tuned", "recipe", "tuned", "grid", "grid"]
COMPLETE = ("val", "test", "accuracy", "seconds", "seconds_over_plain", "end_lr", "end_weight_decay", "whole_seconds")


def args_of(script: Any, out: Path, stand_in: Path, *words: str) -> Any:
    data = ["--data-dir", str(stand_in)] if script is resnet else []
    return parse(script.Args, ["--quick", *data, "--out", str(out), *words])


@pytest.mark.parametrize(("script", "name"), [(resnet, "resnet"), (gpt, "gpt")])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.slow
def test_quick_runs_are_whole_and_are_not_made_again(script, name, dtype, tmp_path, stand_in):
    args = args_of(script, tmp_path, stand_in, "--dtype", dtype)
    rows = script.main(args)
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["run"] for row in runs] == ORDER
    assert all(row[field] is not None and math.isfinite(row[field]) for row in runs for field in COMPLETE)
    assert all(row["dtype"] == dtype and row["card"] == "cpu" for row in runs)
    assert runs[0]["seconds_over_plain"] == 1 and runs[0]["end_lr"] == 1e-3  # torch's own
    tuned, recipe = runs[1], runs[2]
    assert tuned["products_a_step"] > 0 and tuned["start_lr"] == 1e-6 < tuned["end_lr"]
    assert recipe["end_lr"] == pytest.approx(tuned["end_lr"], rel=1e-3)  # as the code prints it
    best = rows[0]
    assert best["kind"] == "best of grid" and (best["points"], best["of"]) == (2, 2)
    assert best["val"] == min(row["val"] for row in runs if row["run"] == "grid")
    curves = [row for row in rows if row["kind"] == "curve"]
    assert len(curves) == len({(row["name"], row["step"]) for row in curves}) == len(runs) * args.points
    assert {row["val"] for row in runs} == {row["val"] for row in curves if row["step"] == args.steps}
    logs = {path.parent.relative_to(tmp_path / "tensorboard").parts for path in tmp_path.rglob("events.out*")}
    assert {(row["name"],) for row in runs} | {(tuned["name"], "tuner")} <= logs
    text = (tmp_path / f"{name}.json").read_text()
    assert json.loads(text)["rows"] == rows and str(tmp_path) not in text and str(stand_in) not in text
    kept = (tmp_path / f"{name}.jsonl").read_text()
    assert script.main(args) == rows and (tmp_path / f"{name}.jsonl").read_text() == kept


def test_a_limit_that_no_run_fits_leaves_no_row(tmp_path, stand_in, capsys):
    rows = resnet.main(args_of(resnet, tmp_path, stand_in, "--minutes", "1e-6"))
    assert rows == [] and finished(tmp_path / "resnet.jsonl") == []
    assert "6 of 6 runs were not begun" in capsys.readouterr().out


def test_what_fits_is_made_whole_and_a_later_call_makes_the_rest(tmp_path, monkeypatch, stand_in):
    """A clock that stands still, and runs that say they took a minute: three minutes are two plain runs and one tuned."""
    made = []

    def run(build, args, done, item):
        made.append(item["run"])
        row = {"val": 1.0, "test": 1.0, "accuracy": 0.5, "seconds": 1.0, "end_lr": 0.1, "curve": [], "recipe": ""}
        clock[0] += 120 if item["run"] == "tuned" else 60
        return item | row | {"whole_seconds": 120 if item["run"] == "tuned" else 60}

    clock = [0.0]
    monkeypatch.setattr(real_runs, "run", run)
    monkeypatch.setattr(real_runs, "probe", lambda build, args: 60.0)
    monkeypatch.setattr(real_runs.time, "perf_counter", lambda: clock[0])
    rows = resnet.main(args_of(resnet, tmp_path, stand_in, "--minutes", "4.5"))
    assert made == ["default", "tuned", "recipe"]  # a fourth would end after the limit
    assert [row["run"] for row in rows if row["kind"] == "run"] == made
    assert [row["run"] for row in finished(tmp_path / "resnet.jsonl")] == made
    rows = resnet.main(args_of(resnet, tmp_path, stand_in))
    assert made == ORDER and [row["run"] for row in rows if row["kind"] == "run"] == ORDER


def test_a_tuned_run_that_does_not_fit_leaves_its_recipe_out_and_cheaper_runs_are_made(tmp_path, monkeypatch, stand_in):
    clock = [0.0]

    def run(build, args, done, item):
        clock[0] += 60
        row = {"val": 1.0, "test": 1.0, "accuracy": 0.5, "seconds": 1.0, "end_lr": 0.1, "curve": []}
        return item | row | {"whole_seconds": 60}

    monkeypatch.setattr(real_runs, "run", run)
    monkeypatch.setattr(real_runs, "probe", lambda build, args: 60.0)
    monkeypatch.setattr(real_runs.time, "perf_counter", lambda: clock[0])
    rows = resnet.main(args_of(resnet, tmp_path, stand_in, "--minutes", "2.5"))
    assert [row["run"] for row in rows if row["kind"] == "run"] == ["default", "grid"]


def test_runs_are_in_the_order_of_their_worth():
    todo = real_runs.items(parse(resnet.Args, ["--device", "cpu"]), "resnet", "fashion")
    names = [real_runs.name_of(item) for item in todo]
    assert names[:9] == [
        "default",
        "tuned from 1e-06 at cost 2",
        "recipe from 1e-06 at cost 2",
        "tuned from 0.1 at cost 2",
        "tuned from 1e-06 at cost 1.5",
        "tuned from 0.1 at cost 1.5",
        "tuned from 1e-06 at cost 1.15",
        "tuned from 0.1 at cost 1.15",
        "grid lr 0.1 weight decay 0.0005",
    ]
    assert len(names) == len(set(names)) == 8 + 15


def test_another_size_is_another_run():
    """A change of what decides a run's numbers is a change of its key; of which runs are made it is not."""
    first = real_runs.items(parse(resnet.Args, ["--device", "cpu"]), "resnet", "fashion")
    for words in (["--width", "8"], ["--steps", "7"], ["--dtype", "fp32"], ["--batch", "3"], ["--seed", "1"]):
        assert first[0] != real_runs.items(parse(resnet.Args, ["--device", "cpu", *words]), "resnet", "fashion")[0]
    for words in (["--minutes", "5"], ["--grid-lr", "1"], ["--out", "elsewhere"], ["--costs", "3"]):
        assert first[0] == real_runs.items(parse(resnet.Args, ["--device", "cpu", *words]), "resnet", "fashion")[0]


def test_the_124_million_weights_of_the_second_command():
    words = ["--layers", "12", "--width", "768", "--heads", "12", "--context", "1024", "--vocabulary", "50257"]
    args = parse(gpt.Args, ["--device", "cpu", *words])
    with torch.device("meta"):
        model = gpt.bench_gpt.GPT(
            gpt.bench_gpt.Size(args.layers, args.width, args.heads, args.context, args.vocabulary, args.batch)
        )
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_fused_attention_is_the_same_function():
    size = gpt.bench_gpt.TINY
    written = gpt.bench_gpt.GPT(size)
    fused = gpt.bench_gpt.GPT(size._replace(fused=True))
    fused.load_state_dict(written.state_dict())
    x, _ = gpt.bench_gpt.data(size)
    torch.testing.assert_close(fused(x), written(x), rtol=1e-5, atol=1e-5)


def test_pieces_of_a_text_are_apart_and_targets_are_the_next_bytes(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(i % 251 for i in range(2000)))
    cut = gpt.pieces(str(text), 4, "cpu")
    assert {name: tuple(x.shape) for name, x in cut.items()} == {"train": (48, 33), "val": (6, 33), "test": (6, 33)}
    x, y = gpt.windows(cut["val"], torch.tensor([0, 1]), torch.tensor([0, 28]), 4)
    first = 8 * 33  # of the ninth piece
    assert x.tolist()[0] == [(first + i) % 251 for i in range(4)]
    assert y.view(2, 4)[1].tolist() == [((first + 330) + 29 + i) % 251 for i in range(4)]


def test_a_text_too_short_is_refused_with_the_size_it_needs(tmp_path):
    (tmp_path / "short").write_text("a few words")
    with pytest.raises(SystemExit, match="11 bytes, and a context of 8 needs 650 at least"):
        gpt.main(parse(gpt.Args, ["--quick", "--text", str(tmp_path / "short"), "--out", str(tmp_path)]))


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (resnet, ["--data", "mnist"], "unknown mnist; choose from fashion, cifar10"),
        (resnet, ["--dtype", "fp16"], "bf16 or fp32, got fp16"),
        (resnet, ["--points", "0"], "--points"),
        (gpt, ["--text", "nowhere.txt"], "no file nowhere.txt"),
        (gpt, ["--vocabulary", "100"], "at least 256"),
        (gpt, ["--attention", "flash"], "fused or written, got flash"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(script, words, message, tmp_path, stand_in):
    with pytest.raises(SystemExit, match=message):
        script.main(args_of(script, tmp_path, stand_in, *words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_to_pass(tmp_path):
    with pytest.raises(SystemExit, match="pass --device cpu"):
        resnet.main(parse(resnet.Args, ["--out", str(tmp_path)]))


def test_cifar_is_standardised_per_channel_and_split(monkeypatch):
    class Stored:
        def __init__(self, root: str, train: bool, download: bool):
            assert not download
            n = 100 if train else 20
            self.data = np.random.default_rng(int(train)).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            self.targets = list(np.arange(n) % 10)

    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    data = datasets.cifar10("somewhere")
    assert [tuple(x.shape) for x, _ in data] == [(90, 3, 32, 32), (10, 3, 32, 32), (20, 3, 32, 32)]
    x = torch.cat([data.train.x, data.val.x])
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    stored = Stored("", True, False)
    by_hand = stored.data[3, 5, 7].astype(float) - stored.data.reshape(-1, 3).mean(0)
    assert torch.allclose(
        x[3, :, 5, 7].double(), torch.from_numpy(by_hand / stored.data.reshape(-1, 3).std(0)), atol=1e-4
    )
    assert data.test.y.tolist() == [i % 10 for i in range(20)]


def test_cifar_that_is_not_there_is_said_with_what_to_do(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match="--data-dir with the folder that holds cifar-10-batches-py"):
        datasets.cifar10(str(tmp_path))
