"""What every number of the param groups has settled on: its mean over the last third of the readings in which it was tuned.

The mean is that of φ, so a geometric one for lr and weight decay. A roll-back or backtrack divides lr at once: what lr was
before is forgotten then, and where it is not tuned any more it has settled on what it is now. So has a number that a scheduler
begins to scale.

    kept      every s-th reading, at most MOST of them a number; s = 1, 2, 4, … as they come
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from hypergrad.online.param_groups import ParamGroupWriter

MOST = 120
SHARE = 1 / 3
CUTS = ("rollbacks", "backtracks", "false_alarms")  # counts of what lr is multiplied at


class SettledValues:
    """Follows φ.

    Args:
        writer: has the numbers, of which those of tensors in the loss are not followed, and knows what else writes them.
        counts: what happened, for `tuner.stats`.
    """

    def __init__(self, writer: ParamGroupWriter, counts: Mapping[str, int]):
        self.writer, self.vector, self.counts = writer, writer.vector, counts
        k = len(self.vector)
        self.kept: list[list[float]] = [[] for _ in range(k)]
        self.stride = [1] * k
        self.seen = [0] * k  # readings since the number was last forgotten
        self.tuned = [False] * k  # at any reading
        self.cuts, self.scaled = 0, dict[tuple[str, int], float]()

    def note(self) -> None:
        """φ has taken a step."""
        for j in self._outdated():
            self.kept[j], self.stride[j], self.seen[j] = [], 1, 0
        self.cuts, self.scaled = self._cuts(), dict(self.writer.bases)
        for j in self.vector.moving:
            if self.vector.entries[j].group is None:
                continue
            self.tuned[j] = True
            if self.seen[j] % self.stride[j] == 0:
                self.kept[j].append(float(self.vector.phi[j]))
            self.seen[j] += 1
            if len(self.kept[j]) > MOST:
                self.kept[j], self.stride[j] = self.kept[j][::2], 2 * self.stride[j]

    def value(self, j: int) -> float:
        """What number j has settled on; what it is, where it was not tuned."""
        last = [] if j in self._outdated() else self._last(j)
        if not last:
            return float(self.vector.value[j])
        return float(self.vector.kinds[j].from_free(torch.tensor(fmean(last), dtype=torch.float64)))

    def rise(self, j: int) -> float:
        """By how much φ of number j has risen over the readings that count."""
        last = [] if j in self._outdated() else self._last(j)
        return last[-1] - last[0] if last else 0.0

    def _last(self, j: int) -> Sequence[float]:
        return self.kept[j][-math.ceil(SHARE * len(self.kept[j])) :] if self.kept[j] else []

    def _cuts(self) -> int:
        return sum(self.counts[name] for name in CUTS)

    def _outdated(self) -> set[int]:
        """The numbers that something other than a hyperparameter step has changed since the last one."""
        cut, now, found = self._cuts() != self.cuts, self.writer.bases, set[int]()
        for j, entry in enumerate(self.vector.entries):
            if entry.group is not None:
                place = entry.name, entry.group
                if (cut and entry.name == "lr") or now.get(place) != self.scaled.get(place):
                    found.add(j)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": [list(xs) for xs in self.kept],
            "stride": list(self.stride),
            "seen": list(self.seen),
            "tuned": list(self.tuned),
            "cuts": self.cuts,
            "scaled": [[*place, base] for place, base in self.scaled.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = [list(xs) for xs in state["kept"]]
        self.stride, self.seen, self.tuned = list(state["stride"]), list(state["seen"]), list(state["tuned"])
        self.cuts, self.scaled = int(state["cuts"]), {(n, g): float(base) for n, g, base in state["scaled"]}
