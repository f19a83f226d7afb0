"""Run the layer table (tests/layers.py) and write experiments/results/layers.json and the table in docs/layers.md.

python scripts/layers.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import results  # noqa: E402
from scripts import tables  # noqa: E402
from tests.layers import LAYERS, outcome_of  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in tqdm(LAYERS, disable=None):
        unrolled, forward = outcome_of(name, "unrolled"), outcome_of(name, "forward")
        outcome = unrolled.outcome if unrolled.outcome == forward.outcome else f"{unrolled.outcome}, {forward.outcome}"
        row = {"layer": name, "outcome": outcome, "unrolled": unrolled.error, "forward": forward.error}
        rows.append(row | {"says": unrolled.says})
        if outcome != LAYERS[name].expected:
            print(f"{name}: {outcome}, expected {LAYERS[name].expected}")
    results.write(results.FOLDER / "layers.json", "python scripts/layers.py", rows)
    for name in tables.differences(write=True):
        print("written: " + name)


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    main()
