"""docs/search.md begins with ten lines each that users of scikit-learn and Optuna know; they run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hypergrad.search import Study

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

GUIDE = Path(__file__).parents[2] / "docs" / "search.md"
CODE = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
# whose users know it -> the example, what it must name, and a check of the study it makes
EXAMPLES: dict[str, tuple[int, tuple[str, ...], Any]] = {
    "scikit-learn": (
        0,
        ("loguniform", "cross_val_score", "from_sklearn", "best_params"),
        lambda study: study.best_value > 0.9 and study.best_params["kernel"] in ("rbf", "linear"),
    ),
    "Optuna": (
        1,
        ("trial.report", "should_prune", "n_trials", "timeout", "log=True", "best_trial"),
        lambda study: study.best_value < 0.01 and {x.state for x in study.trials} == {"complete", "pruned"},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_guide_begins_with_what_its_readers_know(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number, names, right = EXAMPLES[name]
    lines = [line for line in CODE[number].splitlines() if line.strip()]
    assert 9 <= len(lines) <= 11 and all(each in CODE[number] for each in names)
    there: dict[str, Any] = {}
    exec(compile(CODE[number], str(GUIDE), "exec"), there)
    assert isinstance(there["study"], Study) and len(there["study"].trials) == 20
    assert right(there["study"]) and str(there["study"].best_params) in capsys.readouterr().out
