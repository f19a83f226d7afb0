"""Worker processes of `n_jobs` > 1: what they import, who starts them, and what they do when they cannot start as they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import hypergrad
from hypergrad.search import workers

pytest.importorskip("optuna")

ROOT = Path(hypergrad.__file__).parents[1]
OBJECTIVE = """
import os
import time

def objective(p, trial):
    time.sleep(0.2)  # long enough for both workers to begin one
    for name, value in (("pid", os.getpid()), ("parent", os.getppid()), ("said", os.environ.get("SAID"))):
        trial.note(name, value)
    return p["x"] ** 2
"""
SCRIPT = """
import json
import os
import sys
sys.path.insert(0, {root!r})
from hypergrad.search import Float, optimize
from objective import objective

def main():
    calls = []
    for said in {said}:
        os.environ["SAID"] = said
        study = optimize(objective, {{"x": Float(0, 1)}}, "random", 6, n_jobs=2, progress=False)
        calls.append([each.notes for each in study.trials])
    print(json.dumps([os.getpid(), calls]))

{call}
"""
GUARDED = "if __name__ == '__main__':\n    main()"


def run_script(
    folder: Path, call: str = GUARDED, said: tuple[str, ...] = ("once",)
) -> tuple[subprocess.CompletedProcess[str], Counter[str]]:
    """A script of a user's in a folder of its own, and how often each module was imported by all its processes together."""
    (folder / "objective.py").write_text(OBJECTIVE)
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT), call=call, said=said))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, Counter(line.rpartition("|")[2].strip() for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not workers.FORKSERVER, reason="every worker imports by itself here")
def test_modules_are_imported_once_for_all_workers_of_all_calls(tmp_path: Path) -> None:
    done, imported = run_script(tmp_path, said=("first", "second"))
    assert done.returncode == 0, done.stderr[-2000:]
    script, calls = json.loads(done.stdout)
    trials = [notes for call in calls for notes in call]
    assert len(trials) == 12
    for name in ("torch", "optuna.study", "hypergrad.search.objective", "sklearn.model_selection._search"):
        assert imported[name] == 2, name  # by the script, and by the process that the workers are forks of
    assert [len({notes["pid"] for notes in call}) for call in calls] == [2, 2]
    assert len({notes["parent"] for notes in trials} | {script}) == 2
    assert [{notes["said"] for notes in call} for call in calls] == [{"first"}, {"second"}]


@pytest.mark.slow
def test_workers_have_the_packages_of_the_process_that_calls(tmp_path: Path) -> None:
    """Another package of this name lies in the folder: only the script's own path says which one is meant."""
    (tmp_path / "hypergrad").mkdir()
    (tmp_path / "hypergrad" / "__init__.py").touch()
    done, _ = run_script(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    script, (trials,) = json.loads(done.stdout)
    assert len(trials) == 6 and {notes["parent"] for notes in trials} == {script}


# calls that every worker would make again -> the end of what is said
UNGUARDED = {
    "main()": "use workers='threads'.",
    "with open(__file__):\n    main()": "use workers='threads'.",
    "if os.getpid():\n    main()": "Or use workers='threads'.",  # may be meant as a guard: only the workers show that it is none
}


@pytest.mark.slow
@pytest.mark.parametrize("call", UNGUARDED)
def test_a_script_that_every_worker_would_run_again_is_told_so(call: str, tmp_path: Path) -> None:
    done, imported = run_script(tmp_path, call=call)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and done.stdout == ""
    assert last.startswith("RuntimeError: ") and "if __name__ == '__main__':" in last and last.endswith(UNGUARDED[call])
    if not call.startswith("if"):  # no worker was begun
        assert imported["objective"] == 1 and f"script.py, line {17 + call.count(chr(10))}: n_jobs > 1 starts" in last


class Pool:
    """A pool of one start method, whose workers say what they are told to: origins, or an error."""

    says: dict[str, Any]
    begun: list[Pool]

    def __init__(self, _: int, context: Any, **__: Any):
        self.method, self.open = context.get_start_method(), True
        self.begun.append(self)

    def submit(self, function: Any) -> Future[Any]:
        future: Future[Any] = Future()
        said = self.says[self.method]
        future.set_exception(said) if isinstance(said, BaseException) else future.set_result(said)
        return future

    def shutdown(self, cancel_futures: bool = False) -> None:
        self.open = False


# what workers say where their packages are from, by how they begin -> the method that is left, or what is raised
SAID: dict[str, tuple[Any, Any, Any]] = {
    "the same": (workers._origins(), BrokenProcessPool(), "forkserver"),
    "other packages": (workers._origins() | {"torch": "elsewhere"}, {}, "spawn"),
    "nothing, as the server died": (ConnectionRefusedError(), {}, "spawn"),
    "nothing, as they died": (BrokenProcessPool(), {}, "spawn"),
    "nothing either way": (BrokenProcessPool(), BrokenProcessPool(), RuntimeError),
    "Ctrl-C": (KeyboardInterrupt(), {}, KeyboardInterrupt),
}


@pytest.mark.skipif(not workers.FORKSERVER, reason="there is one way to begin")
@pytest.mark.parametrize("name", SAID)
def test_how_workers_begin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is not used is shut down."""
    forked, spawned, found = SAID[name]
    monkeypatch.setattr(Pool, "says", {"forkserver": forked, "spawn": spawned}, raising=False)
    monkeypatch.setattr(Pool, "begun", [], raising=False)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    if isinstance(found, str):
        assert workers.process_pool(2).method == found  # type: ignore[attr-defined]
    else:
        with pytest.raises(found):
            workers.process_pool(2)
    assert [pool.method for pool in Pool.begun if pool.open] == ([found] if isinstance(found, str) else [])
