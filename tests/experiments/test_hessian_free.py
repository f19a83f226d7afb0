import math

import pytest

from experiments import hessian_free
from experiments.arguments import parse


def test_every_form_of_every_workload_has_a_loss_and_a_cost(tmp_path, capsys):
    rows = hessian_free.main(parse(hessian_free.Args, ["--quick", "--workloads", "diabetes", "--out", str(tmp_path)]))
    ends = {row["form"]: row for row in rows if row["kind"] == "overall"}
    assert set(ends) == {"exact", "free", "start"}
    assert ends["start"]["cost"] <= ends["free"]["cost"] < ends["exact"]["cost"]
    runs = [row for row in rows if row["kind"] == "run"]
    assert len(runs) == 3 and all(math.isfinite(row["val"]) and "test" not in row for row in runs)
    assert "plain run" in capsys.readouterr().out


def test_a_wrong_argument_is_said_before_any_run(tmp_path):
    for words in (["--workloads", "nothing"], ["--seed", "999", "--seeds", "2"], ["--starts", "0"]):
        with pytest.raises(SystemExit):
            hessian_free.main(parse(hessian_free.Args, ["--quick", "--out", str(tmp_path), *words]))
    assert not list(tmp_path.iterdir())
