"""What a person sees when the scripts cannot set themselves up: one clear line, before anything is made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OLD = """case "$1" in --version) echo "Python 3.9.1" ;; *) exit 1 ;; esac"""
WITHOUT_VENV = """case "$2" in *ensurepip*) exit 1 ;; esac"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a fresh clone, as far as setting up looks at it."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def fake_python(clone: Path, script: str) -> str:
    path = clone / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize(
    ("python", "message"),
    [
        (None, "no 'no-such-python' in PATH"),
        (OLD, "is Python 3.9.1; hypergrad needs Python 3.11 or newer"),
        (WITHOUT_VENV, "apt-get install python3-venv"),
    ],
    ids=["missing", "old", "without venv"],
)
def test_a_python_that_cannot_serve_is_said_and_nothing_is_made(clone, script, python, message):
    name = fake_python(clone, python) if python else "no-such-python"
    done = subprocess.run(
        ["bash", str(clone / "scripts" / script)],
        cwd="/",
        env={**os.environ, "PYTHON": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert not (clone / ".venv").exists()


def test_an_environment_that_is_up_to_date_is_used_as_it_is(clone):
    """pip is called when pyproject.toml is new or changed, and only then."""
    binary = clone / ".venv/bin"
    binary.mkdir(parents=True)
    (binary / "python").write_text('#!/bin/sh\necho "$@" >>called\n')
    (binary / "python").chmod(0o755)
    setup = ["bash", "-c", f"source {clone}/scripts/setup.sh && echo $PATH"]

    def calls_of_pip_install() -> int:
        done = subprocess.run(setup, cwd="/", capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1].startswith(str(binary))
        return (clone / "called").read_text().count("pip install")

    assert [calls_of_pip_install(), calls_of_pip_install()] == [1, 1]
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert calls_of_pip_install() == 2


def test_ci_runs_the_tests():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "scripts/test.sh" in (ROOT / ".ci/run").read_text()
