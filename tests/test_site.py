"""The documentation site builds without a warning, and its API reference has every public name and every argument."""

from __future__ import annotations

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hypergrad

ROOT = Path(__file__).parents[1]
SLOW_TO_IMPORT = ("lightning.TunerCallback", "transformers.TunerMixin", "skorch.TunerCallback", "accelerate.unwrap")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name, reason="the site needs the extra docs: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def documented() -> dict[str, object]:
    """Full name of everything public → the thing itself."""
    found: dict[str, object] = {}
    for module in (hypergrad, hypergrad.policies, hypergrad.search):
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}
    for module in (hypergrad.schedules, hypergrad.solvers):
        own = {n: x for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__ and n[0] != "_"}
        found |= {
            f"{module.__name__}.{name}": x for name, x in own.items() if inspect.isclass(x) or inspect.isfunction(x)
        }
    found |= dict.fromkeys(f"hypergrad.integrations.{name}" for name in SLOW_TO_IMPORT)
    del found["hypergrad.search.Run"]  # hypergrad.Run
    return {name: x for name, x in found.items() if not inspect.ismodule(x)}


@pytest.mark.slow
def test_the_reference_has_every_public_name_and_every_argument(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((site / "api").rglob("*.html")))
    sections = {
        part[1]: part[2] for part in re.finditer(r'<h2 id="([\w.]+)"(.*?)(?=<h2 id=|</article>)', pages, re.DOTALL)
    }
    for name, thing in documented().items():
        assert name in sections, name
        shown = html.unescape(re.sub(r"<[^>]*>", "", sections[name]))
        if inspect.isclass(thing) or inspect.isfunction(thing):
            if isinstance(thing, type) and issubclass(thing, Exception):
                continue
            arguments = [p for p in inspect.signature(thing).parameters if p[0] != "_"]
            assert all(re.search(rf"\b{p}\b", shown) for p in arguments), (name, arguments)


@pytest.mark.slow
def test_tuners_arguments_are_each_explained(site: Path) -> None:
    """Not in the signature alone: an entry of the list of parameters, two names in one entry too."""
    page = (site / "api/tuner/index.html").read_text(encoding="utf-8")
    listed = set(re.findall(r"<b><code>(\w+)</code></b>", page)) | set(re.findall(r"<code>(\w+)</code></strong>", page))
    assert set(inspect.signature(hypergrad.Tuner).parameters) <= listed


@pytest.mark.slow
def test_links_to_code_lead_to_pages_of_the_site(site: Path) -> None:
    page = (site / "online/index.html").read_text(encoding="utf-8")
    (link,) = set(re.findall(r'href="([^"]*hypergrad/online/policies[^"]*)"', page))
    listing = (site / "online" / link / "index.html").resolve().read_text(encoding="utf-8")
    assert "newton_climb.py" in listing


@pytest.mark.slow
def test_recipes_are_shown_below_their_links(site: Path) -> None:
    page = html.unescape(re.sub(r"<[^>]*>", "", (site / "recipes/index.html").read_text(encoding="utf-8")))
    for path in (ROOT / "experiments/recipes").glob("*.py"):
        if path.stem != "__init__" and not path.stem.endswith("_digits"):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            assert first in page, path
