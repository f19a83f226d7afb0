from pathlib import Path

import pytest

pytest.importorskip("optuna")
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[tune]'")

from experiments import ray_study  # noqa: E402
from hypergrad.search.ray_workers import Cluster, connected  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own processes
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]


@pytest.mark.slow
def test_twenty_trials_survive_a_killed_worker() -> None:
    if ray.is_initialized():
        ray.shutdown()
    args = ray_study.Args(trials=20, kills=1, epochs=2)
    with connected(2, Cluster()):
        row, _ = ray_study.study_row("killed", args, 1, backend="ray", n_jobs=2, progress=False)
    assert not ray.is_initialized()  # what was started for it is shut down
    assert (row["trials"], row["lost"], row["duplicates"], row["failed"], row["killed"]) == (20, 0, 0, 0, 1)
    assert row["begun"] - 20 <= row["retries"] <= 1 and row["epochs_counted"] == 40


def test_a_trial_that_is_ended_twice_is_a_duplicate(tmp_path: Path) -> None:
    ended = '{"op_code":6,"worker_id":"w","trial_id":%d,"state":%d}\n'
    (tmp_path / "j").write_text("".join(ended % each for each in [(0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]))
    assert ray_study.endings(tmp_path / "j") == {0: 1, 1: 2}


@pytest.mark.slow
def test_entries_of_a_journal_are_counted() -> None:
    row = ray_study.journal_row(1, 0.1)
    assert row["writers"] == 1 and row["per_second"] > 0
