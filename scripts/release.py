"""Checks before a release, by hand: `bash scripts/test.sh --release [--out FOLDER]`. Needs the network.

    soak          the hypergradient of a run of many steps, with checkpoints on disk (`experiments.long_run`); 100,000 steps of a
                  tuner with flat memory, and a training that is killed fifty times and ends bit-equal (`experiments.soak`)
    kill          the tests that kill processes and resume, three times each
    wheel         a wheel is built, has every module, and works in a fresh environment that cannot see this folder
    environments  the fast tests by every other Python in PATH that has torch, and by every .venv-*/bin/python of this folder:
                  `python3.13 -m venv .venv-torch2.11 && .venv-torch2.11/bin/pip install torch==2.11.0 -e '.[dev]'` makes one

Writes release.json: a row for each check, with `passed`, seconds, and the end of what it printed. The exit status is 1 unless all
have passed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from experiments import results  # noqa: E402

KILL_TESTS = "kill or dies or ctrl_c"  # pytest -k
KILL_FOLDERS = ["tests/search", "tests/whole_run"]
REPEATS = 3
SHOWN = 2000  # characters of the end of an output

# One tuned run in the fresh environment. It prints where hypergrad was imported from.
SMALL_RUN = """
import torch, hypergrad, hypergrad.search
model = torch.nn.Linear(1, 1)
sgd = torch.optim.SGD(model.parameters(), lr=0.01)
loss = lambda: (model(torch.ones(1, 1)) - 1).square().sum()
tuner = hypergrad.Tuner(model, sgd, loss, tune=("lr",))
for _ in range(30):
    sgd.zero_grad()
    tuner.backward(loss())
    sgd.step()
assert float(tuner.values["lr"]) != 0.01
print(hypergrad.__file__)
"""


def run(*command: str, cwd: Path = ROOT) -> str:
    """Run a command and return what it printed; raises RuntimeError where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"[-SHOWN:])
    return done.stdout


def soak() -> str:
    with tempfile.TemporaryDirectory() as folder:
        said = run(sys.executable, "-m", "experiments.long_run", "--out", folder)
        said += run(sys.executable, "-m", "experiments.soak", "--out", folder)
        kills, memory = json.loads((Path(folder) / "soak.json").read_text(encoding="utf-8"))["rows"]
    if not kills["equal"] or memory["bytes_a_step"] * memory["steps"] > 0.01 * memory["bytes"]:
        raise RuntimeError(f"a killed training ended differently, or memory grows by more than 1 %:\n{said}"[-SHOWN:])
    return said


def kill() -> str:
    tests = ["-m", "pytest", "-q", "-k", KILL_TESTS, *KILL_FOLDERS]
    return "\n".join(run(sys.executable, *tests).splitlines()[-1] for _ in range(REPEATS))


def wheel() -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
        (built,) = folder.glob("*.whl")
        here = {str(path.relative_to(ROOT)) for path in (ROOT / "hypergrad").rglob("*.py")} | {"hypergrad/py.typed"}
        if missing := here - set(zipfile.ZipFile(built).namelist()):
            raise RuntimeError(f"the wheel has not {sorted(missing)}")
        run(sys.executable, "-m", "venv", str(folder / "fresh"))
        python = str(folder / "fresh/bin/python")
        run(python, "-m", "pip", "install", "--quiet", str(built))
        imported = run(python, "-c", SMALL_RUN, cwd=folder).strip()
        if not Path(imported).is_relative_to(folder / "fresh"):
            raise RuntimeError(f"hypergrad was imported from {imported}, not from the wheel")
        return f"{built.name}; {run(python, '-m', 'pip', 'freeze')}"


def has_torch(python: str) -> bool:
    done = subprocess.run([python, "-c", "import torch, pytest"], capture_output=True, check=False)
    return done.returncode == 0


def other_pythons() -> Iterator[str]:
    for minor in range(11, 16):
        found = shutil.which(f"python3.{minor}")
        if found and minor != sys.version_info.minor and has_torch(found):
            yield found
    yield from map(str, sorted(ROOT.glob(".venv-*/bin/python")))


def environment(python: str) -> str:
    versions = run(python, "-c", "import sys, torch; print(sys.version.split()[0], torch.__version__)")
    return versions + run(python, "-m", "pytest", "-q", "-m", "not slow").splitlines()[-1]


def measured(name: str, check: Callable[[], str]) -> dict[str, Any]:
    print(f"{name} …", flush=True)
    began = time.perf_counter()
    try:
        passed, output = True, check()
    except RuntimeError as error:
        passed, output = False, str(error)
    output = re.sub(
        r"/(home|root|work|tmp|Users|var)/[^\s'\"]*", "PATH", output[-SHOWN:]
    )  # a result file names no machine
    row = {"check": name, "passed": passed, "seconds": round(time.perf_counter() - began, 1), "output": output}
    print(f"{name}: {'passed' if passed else 'FAILED'} after {row['seconds']} s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks before a release.")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results", help="folder of release.json")
    parser.add_argument(
        "--only", nargs="+", choices=("soak", "kill", "wheel", "environments"), help="some of the checks"
    )
    args = parser.parse_args()
    checks: dict[str, Callable[[], str]] = {"wheel": wheel, "kill": kill, "soak": soak}
    chosen = {name: check for name, check in checks.items() if not args.only or name in args.only}
    rows = [measured(name, check) for name, check in chosen.items()]
    if not args.only or "environments" in args.only:
        rows += [measured(f"environment {i}", partial(environment, python)) for i, python in enumerate(other_pythons())]
    results.write(args.out / "release.json", "bash scripts/test.sh --release", rows)
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
