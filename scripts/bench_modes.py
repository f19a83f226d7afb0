"""Time and memory of every mode beside other libraries: `python scripts/bench_modes.py --help` (experiments/bench_modes.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.bench_modes import start

if __name__ == "__main__":
    start()
