"""lr's warm starts: one for all optimizers while they go down one loss, one for each once their losses differ."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from hypergrad.online.policies.lr_warm_start import LrSearch, LrWarmStart


class LrSearches:
    """Warm starts under way.

    Args:
        policy: their constants; None: there are none.
        active: whether lr is to be found.
    """

    def __init__(self, policy: LrWarmStart | None, active: bool):
        self.policy = policy
        self.common = LrSearch(policy, active)
        self.own: dict[int, LrSearch] | None = None  # by optimizer, once losses differ
        self.coupled = False  # losses of their own that depend on the same parameters
        self.last: dict[int, int] = {}  # the last step that each optimizer has taken

    @property
    def active(self) -> bool:
        """Whether any is under way."""
        return self.common.active if self.own is None else any(search.active for search in self.own.values())

    @property
    def apart(self) -> bool:
        return self.own is not None

    def of(self, i: int) -> LrSearch:
        """That of optimizer i."""
        return self.common if self.own is None else self.own[i]

    def stop(self) -> None:
        for search in (self.common, *(self.own or {}).values()):
            search.stop()

    def part(self, optimizers: Collection[int]) -> None:
        """From now on each optimizer has its own: what was common so far, or a new one where it has taken no step yet."""
        begun = {i: copy.copy(self.common) for i in optimizers if i in self.last}
        self.own = {i: begun.get(i) or LrSearch(self.policy, self.common.active) for i in optimizers}

    def couple(self) -> None:
        """The losses depend on the same parameters."""
        self.coupled = True
        for search in (self.own or {}).values():
            search.coupled = True

    def begins(self, i: int) -> bool:
        """Whether optimizer i has taken no step yet."""
        return i not in self.last

    def stepped(self, i: int, t: int) -> None:
        self.last[i] = t

    def state_dict(self) -> dict[str, Any]:
        own = None if self.own is None else [[i, search.state_dict()] for i, search in self.own.items()]
        return {
            "common": self.common.state_dict(),
            "own": own,
            "coupled": self.coupled,
            "last": [list(pair) for pair in self.last.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.common.load_state_dict(state["common"])
        self.own, self.coupled = None, bool(state["coupled"])
        if state["own"] is not None:
            self.own = {int(i): LrSearch(self.policy, True) for i, _ in state["own"]}
            for i, saved in state["own"]:
                self.own[int(i)].load_state_dict(saved)
        self.last = {int(i): int(t) for i, t in state["last"]}
