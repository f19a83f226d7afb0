"""The layout of the library: imports run downwards and without circles, files are short, names are unique."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import hypergrad

ROOT = Path(hypergrad.__file__).parent
# A package may import what stands before it. Packages of one rank may not import each other.
RANKS = [
    ("core",),
    ("optimizers",),
    ("differentiate",),
    ("online",),
    ("whole_run", "checks"),
    ("search", "integrations"),
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
ABOVE_CORE = {"solvers": 0.5, "schedules": 0.5, "logging": 0.5}  # files that may import core, and that all may import
FACES = {"policies": 3.5}  # files that show names of a package, and are imported by hypergrad itself alone
LONGEST, ENTRIES = 300, 14


class Import(NamedTuple):
    file: Path
    line: int
    of: str  # the module that imports, hypergrad.core.problem
    module: str  # the module that is imported

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT.parent)}:{self.line} imports {self.module}"


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    return {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of the library that an import statement names."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        names = [f"{node.module}.{alias.name}" for alias in node.names]  # a module, or a name in one
    for name in names:
        if name.split(".")[0] == "hypergrad":
            yield name if name in files() else name.rpartition(".")[0]


@cache
def imports() -> list[Import]:
    """All imports of the library's own modules: inside functions and under TYPE_CHECKING too."""
    found = []
    for name, file in files().items():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            found += [Import(file, node.lineno, name, module) for module in imported(node)]
    return found


def rank(module: str) -> float:
    """The public face, hypergrad itself, is above all."""
    parts = module.split(".")
    if len(parts) == 1:
        return len(RANKS)
    return (ABOVE_CORE | FACES).get(parts[1], RANK.get(parts[1], len(RANKS)))


def test_imports_run_downwards() -> None:
    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    between = [i for i in imports() if package(i.of) != package(i.module)]
    upward = [str(i) for i in between if rank(i.module) >= rank(i.of)]
    assert not upward, "\n".join(["imports that do not run downwards:", *upward])


def test_no_circles() -> None:
    """Among modules; a package counts by the imports of its __init__.py."""
    left = [i for i in imports() if i.module != i.of]
    while True:  # an import is part of no circle if nothing imports its file, or if what it imports imports nothing
        sources, targets = {i.of for i in left}, {i.module for i in left}
        kept = [i for i in left if i.of in targets and i.module in sources]
        if kept == left:
            break
        left = kept
    assert not left, "\n".join(["imports that are part of a circle, or lie between two:", *map(str, left)])


def test_files_are_short() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in files().items()}
    long = [f"{name}: {n} lines" for name, n in lengths.items() if n > LONGEST]
    assert not long, "\n".join([f"files of more than {LONGEST} lines:", *long])


def test_names_of_files_are_unique() -> None:
    counts = Counter(file.name for file in files().values() if file.name != "__init__.py")
    twice = [str(file.relative_to(ROOT.parent)) for file in files().values() if counts[file.name] > 1]
    assert not twice, "\n".join(["files of the same name:", *twice])


# what reads objects of any class from a file, and so can run code; the one place that names the classes it reads is listed
UNPICKLERS = {
    "pickle.load",
    "pickle.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "dill.load",
    "joblib.load",
    "marshal.load",
}
READS_NAMED_CLASSES = {"hypergrad.search.stored_data"}  # by a pickle.Unpickler of its own


def test_files_are_read_as_data() -> None:
    """`torch.load` with weights_only=True written out, and no other reader of pickles."""
    found = []
    for name, file in files().items():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            words = {word.arg: ast.unparse(word.value) for word in node.keywords} if isinstance(node, ast.Call) else {}
            loose = called == "torch.load" and words.get("weights_only") != "True"
            unpickles = called in UNPICKLERS or words.get("allow_pickle") == "True"
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "pickle.Unpickler":
                unpickles = name not in READS_NAMED_CLASSES
            if loose or unpickles:
                found.append(f"{file.relative_to(ROOT.parent)}:{node.lineno} {ast.unparse(node)}")  # type: ignore[attr-defined]
    assert not found, "\n".join(["files that are not read as data:", *found])


def test_few_entries_in_the_library() -> None:
    entries = sorted(entry.name for entry in ROOT.iterdir() if entry.name != "__pycache__")
    assert len(entries) <= ENTRIES, entries


def test_the_library_shows_its_public_names_only() -> None:
    assert sorted(dir(hypergrad)) == sorted([*hypergrad.__all__, "__version__"])
