"""Checks before a release, by hand: `bash scripts/test.sh --release [--out FOLDER]`. Needs the network.

    soak          the hypergradient of a run of many steps, with checkpoints on disk (`experiments.long_run`); 100,000 steps of a
                  tuner with flat memory, and a training that is killed fifty times and ends bit-equal (`experiments.soak`)
    kill          the tests that kill processes and resume, three times each
    wheel         sdist and wheel are built, have every module, and README's Python runs by the wheel in a fresh environment that
                  cannot see this folder
    environments  the fast tests by every other Python in PATH that has torch, and by every .venv-*/bin/python of this folder.
                  `python3.11 -m venv .venv-oldest` and
                  `.venv-oldest/bin/pip install torch==2.10.0 -e '.[experiments,search,dev]'` make one

Writes release.json: a row for each check, with `passed`, seconds, and the end of what it printed. With --only the rows of other
checks stay: environments that are large may be made and removed one after the other. The exit status is 1 unless all have passed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
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

# What README's Python takes for granted.
BEFORE_SNIPPET = """
import torch
torch.manual_seed(0)
x_train, x_val = torch.randn(256, 8), torch.randn(128, 8)
y_train, y_val = (torch.sin(x[:, :1]) for x in (x_train, x_val))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x_train, y_train), batch_size=32, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
criterion, epochs = torch.nn.MSELoss(), 10
"""
AFTER_SNIPPET = """
assert float(tuner.values["lr"]) > 1e-4, tuner.values
assert tuner.recipe().optimizers[0].groups[0]["lr"] > 1e-4
assert hypergrad.check(model, optimizer, training_loss, five, val_loss, wrt=("lr", "weight_decay")).ok
import hypergrad.search
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


def snippet() -> str:
    """README's Python, with what it takes for granted before it. Prints where hypergrad was imported from last."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return "\n".join([BEFORE_SNIPPET, *found, AFTER_SNIPPET])


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel, in folder, from a copy of what they are made of; raises RuntimeError where a module is missing."""
    tree, out = folder / "tree", folder / "dist"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "hypergrad", tree / "hypergrad", ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("sdist", "wheel"):
        code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
        run(sys.executable, "-c", code, cwd=tree)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hypergrad").rglob("*.py")} | {"hypergrad/py.typed"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for built, names in ((sdist, inside), (wheel, set(zipfile.ZipFile(wheel).namelist()))):
        if missing := here - names:
            raise RuntimeError(f"{built.name} has not {sorted(missing)}")
    return sdist, wheel


def wheel() -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist, built = build(folder)
        run(sys.executable, "-m", "venv", str(folder / "fresh"))
        python = str(folder / "fresh/bin/python")
        run(python, "-m", "pip", "install", "--quiet", str(built))
        imported = run(python, "-c", snippet(), cwd=folder).splitlines()[-1]
        if not Path(imported).is_relative_to(folder / "fresh"):
            raise RuntimeError(f"hypergrad was imported from {imported}, not from the wheel")
        return f"{sdist.name}, {built.name}; {run(python, '-m', 'pip', 'freeze')}"


def has_torch(python: str) -> bool:
    done = subprocess.run([python, "-c", "import torch, pytest"], capture_output=True, check=False)
    return done.returncode == 0


def other_pythons() -> Iterator[str]:
    for minor in range(11, 16):
        found = shutil.which(f"python3.{minor}")
        if found and minor != sys.version_info.minor and has_torch(found):
            yield found
    yield from map(str, sorted(ROOT.glob(".venv-*/bin/python")))


def versions(python: str) -> str:
    return run(
        python, "-c", "import sys, torch; print(f'Python {sys.version.split()[0]}, torch {torch.__version__}')"
    ).strip()


def environment(python: str, tests: list[str]) -> str:
    return run(python, "-m", "pytest", "-q", "-m", "not slow", *tests).splitlines()[-1]


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
    parser.add_argument("--tests", nargs="+", default=[], help="folders: environments run their fast tests, not all")
    args = parser.parse_args()
    checks: dict[str, Callable[[], str]] = {"wheel": wheel, "kill": kill, "soak": soak}
    chosen = {name: check for name, check in checks.items() if not args.only or name in args.only}
    rows = [measured(name, check) for name, check in chosen.items()]
    if not args.only or "environments" in args.only:
        which = " ".join(["fast tests", *(["of", *args.tests] if args.tests else [])])
        rows += [
            measured(f"{which}, {versions(python)}", partial(environment, python, args.tests))
            for python in other_pythons()
        ]
    if args.only and (before := results.load("release.json", args.out)):
        measured_now = {row["check"] for row in rows}
        rows = [row for row in before["rows"] if row["check"] not in measured_now] + rows
    results.write(args.out / "release.json", "bash scripts/test.sh --release", rows)
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
