"""Hooks of mkdocs.yml: what docs/ links to outside of itself becomes a page of the site.

README is its home; CONTRIBUTING and CHANGELOG are pages; code, logs and folders that a page links to are shown under source/. So
one link serves a code host and the site, and `mkdocs build --strict` finds those that lead nowhere. A link to a recipe that
stands alone on its line has the file below it in the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=(?:#[^)\s]*)?\))")  # its path, without an anchor
RECIPE = re.compile(r"^\[[\w.]+\]\(\.\./(experiments/recipes/\w+\.py)\)$", re.MULTILINE)
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add those pages."""
    done = {DOCS / file.src_uri for file in files}
    waiting = [ROOT / name for name in PAGES] + [path for path in done if path.suffix == ".md"]
    while waiting:
        path = waiting.pop()
        text = page(path)
        if path not in done:
            done.add(path)
            uri = place(path)
            level = InclusionLevel.INCLUDED if uri in PAGES.values() else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, content=relinked(text, path), inclusion=level))
        waiting += [target for target in targets(text, path) if target not in done]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of docs/ lead to where those pages are, and recipes stand below their links."""
    path = DOCS / page.file.src_uri
    if not path.is_file():
        return markdown
    return relinked(RECIPE.sub(r'\g<0>\n\n``` { .python }\n--8<-- "\1"\n```', markdown), path)


def place(path: Path) -> str:
    """Where a file or folder of the repository stands in the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return PAGES.get(name) or f"source/{name.removesuffix('.md')}.md"


def targets(text: str, origin: Path) -> Iterator[Path]:
    """What of the repository a text links to."""
    for match in LINK.finditer(text):
        path = (origin if origin.is_dir() else origin.parent).joinpath(match[0]).resolve()
        if path.exists() and path.is_relative_to(ROOT) and path != DOCS:
            yield path


def relinked(text: str, origin: Path) -> str:
    """The text with paths of the repository made into paths of the site."""
    here = posixpath.dirname(place(origin)) or "."

    def link(match: re.Match[str]) -> str:
        (path,) = tuple(targets(f"]({match[0]})", origin)) or (None,)
        return match[0] if path is None else posixpath.relpath(place(path), here)

    return LINK.sub(link, text)


def page(path: Path) -> str:
    """A page as Markdown: a text as it is, code in a block, a folder as the list of its files."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    title = f"---\nsearch:\n  exclude: true\n---\n# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "".join(
            f"- [`{inner.name}`]({inner.name})\n" if inner.suffix in (".py", ".md") else f"- `{inner.name}`\n"
            for inner in sorted(path.iterdir())
            if not inner.name.startswith((".", "__pycache__"))
        )
    return f"{title}~~~~~{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n~~~~~\n"
