"""One side: run cases with the hypergrad and the experiments of the current folder, whichever commit that is.

    cd ROOT && python PATH/OF/side.py RESULT full|quick NAME …

The cases are those beside this file. RESULT gets a line of JSON a case, when it is done: case, steps, error (None where it did
not raise), skipped (why, or None) and seconds.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE = "experiments.same_numbers"


def use(root: Path) -> None:
    """Import hypergrad and experiments from `root`, and this package from its own folder in place of one in `root`.

    Raises:
        SystemExit: they came from somewhere else.
    """
    sys.path[0] = str(root)
    import experiments
    import hypergrad

    for module in (hypergrad, experiments):
        if not Path(module.__file__ or "").resolve().is_relative_to(root.resolve()):
            raise SystemExit(f"{module.__name__} was imported from {module.__file__}, not from {root}")
    spec = importlib.util.spec_from_file_location(PACKAGE, HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    read_no_clock()


def read_no_clock() -> None:
    """Tuners make no plan: it follows from measured seconds, and would differ from run to run."""
    from hypergrad.online import tuner_parts

    measured = getattr(tuner_parts, "Calibration", None)
    if measured is not None:  # commits before `cost` have none
        tuner_parts.Calibration = lambda device, *_: measured(device, False)


def run(name: str, quick: bool) -> dict[str, Any]:
    """One case, from the same random numbers whatever ran before it."""
    import numpy as np
    import torch

    from experiments.same_numbers.cases import CASES
    from experiments.same_numbers.record import Recorder, Skip

    torch.set_default_dtype(torch.float32)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    record, error, skipped, began = Recorder(), None, None, time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CASES[name](record, quick)
    except Skip as why:
        skipped = str(why)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".replace(f"{Path.cwd()}/", "")
        traceback.print_exc()
    seconds = round(time.perf_counter() - began, 3)
    return {"case": name, "steps": record.steps, "error": error, "skipped": skipped, "seconds": seconds}


def main(result: str, how: str, *names: str) -> None:
    use(Path.cwd())
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    with Path(result).open("w", encoding="utf-8") as lines:
        for name in tqdm(names, desc=Path(result).stem, unit="case", disable=None):
            lines.write(json.dumps(run(name, how == "quick")) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
