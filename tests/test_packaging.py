"""What is published: one version everywhere, an sdist and a wheel with every module, and an example in README that runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import hypergrad
from scripts import release

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", text("CITATION.cff"), re.MULTILINE)
    changed = re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)
    assert cited is not None and changed is not None
    assert {cited[1], changed[1], tomllib.loads(text("pyproject.toml"))["project"]["version"]} == {
        hypergrad.__version__
    }


def test_every_extra_is_installed_by_the_scripts() -> None:
    """Else `--all` skips the tests of one; `bench` is for comparisons only, and its test cases skip without it."""
    extras = set(tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"])
    installed = re.search(r"-e '\.\[([\w,]+)\]'", text("scripts/setup.sh"))
    assert installed is not None
    assert set(installed[1].split(",")) == extras - {"bench"}


def test_the_public_ci_calls_what_ci_runs() -> None:
    assert re.search(r"^ +- run: \.ci/run$", text(".github/workflows/ci.yml"), re.MULTILINE)


def test_readmes_python_runs_and_finds_lr() -> None:
    """As release.py runs it in a fresh environment, with asserts: lr 1e-6 becomes a hundred times larger, in the recipe too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = subprocess.run(
            [sys.executable, "-c", release.snippet()], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == ROOT / "hypergrad/__init__.py"


def test_sdist_and_wheel_have_every_module(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    sdist, wheel = release.build(tmp_path)
    assert (sdist.name, wheel.name) == (
        f"torch_hypergrad-{hypergrad.__version__}.tar.gz",
        f"torch_hypergrad-{hypergrad.__version__}-py3-none-any.whl",
    )
