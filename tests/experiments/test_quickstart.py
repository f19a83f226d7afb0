import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hypergrad
from experiments import quickstart
from experiments.arguments import parse


def logged(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_the_quick_run_ends_with_a_table_curves_and_the_line_to_browse_them(tmp_path, capsys):
    threads = torch.get_num_threads()
    rows = quickstart.main(parse(quickstart.Args, ["--quick", "--out", str(tmp_path)]))
    torch.set_num_threads(threads)
    out = capsys.readouterr()
    assert [row["method"] for row in rows][:2] == ["tuned by hypergrad", "untuned"]
    tuned, untuned, default, search = rows
    assert tuned["lr"] != untuned["lr"] == 1e-4
    assert default["lr"] == 1e-3
    assert untuned["gradient_evaluations"] == 200 < tuned["gradient_evaluations"]
    assert search["gradient_evaluations"] == 2 * 200
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)

    last = out.out.strip().splitlines()[-1]
    logdir = Path(last.partition("tensorboard --logdir ")[2])
    assert logdir.parent == tmp_path
    assert (logdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    runs = {run.name: logged(run) for run in logdir.iterdir() if run.is_dir()}  # TensorBoard shows them by their names
    assert set(runs) == {"tuned", "untuned", "lr 1e-3", "best of 2"}
    steps = [point.step for point in runs["tuned"].Scalars("loss/val")]
    for method, name in zip(rows[1:], ["untuned", "lr 1e-3", "best of 2"]):
        run, last = runs[name], {tag: runs[name].Scalars(tag)[-1].value for tag in runs[name].Tags()["scalars"]}
        assert set(last) <= set(runs["tuned"].Tags()["scalars"])  # in the tuned run's charts
        assert last["loss/val"] == pytest.approx(method["val_loss"])
        assert last["hyper/lr_scale"] == pytest.approx(method["lr"])
        assert last["hyper/log10_weight_decay"] == pytest.approx(math.log10(method["weight_decay"]))
        assert last["lr/applied"] == pytest.approx(
            method["lr"] / 200
        )  # of step 200, after 199 of a decay to zero over 200
        assert run.Scalars("loss/val")[-1].step == steps[-1] == 200
    assert json.loads((tmp_path / "quickstart.json").read_text())["rows"] == rows
    assert "\r" not in out.err  # no bar where the output is no terminal


@pytest.mark.parametrize(("lr", "weight_decay"), [(1e-4, 1e-6), (0.05, 1e-3)], ids=["start", "tuned"])
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_the_tuned_loop_passes_hypergrad_check(lr, weight_decay, mode):
    model, optimizer, loss, batches, val_loss, _ = quickstart.job(quickstart.Args(), lr, weight_decay)
    wrt = ("lr", "weight_decay")
    report = hypergrad.check(model, optimizer, loss, list(islice(batches, 5)), val_loss, wrt=wrt, mode=mode)
    assert [row.name for row in report.rows] == list(wrt)
    assert report.ok, f"\n{report}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(SystemExit, match="no GPU"):
        quickstart.main(quickstart.Args(device="cuda"))
