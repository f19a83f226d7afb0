"""Every row of the loops: hypergradients against finite differences of the user's own loop, and its weights bit for bit."""

from __future__ import annotations

import pytest

from tests.online.live_loops import float64
from tests.online.loop_rows import (
    AS_PLAIN,
    REFUSED,
    SAID,
    SUPPORTED,
    UNSEEN,
    check_bit_identical,
    check_hypergradients,
    check_refused,
    check_said,
)
from tests.online.loops_steps import STEPS

__all__ = ["float64"]  # the fixture
from tests.online.loops_by_hand import BY_HAND
from tests.online.loops_detached import DETACHED
from tests.online.loops_fields import FIELDS
from tests.online.loops_losses import LOSSES
from tests.online.loops_modules import MODULES
from tests.online.loops_optimizers import OPTIMIZERS

LOOPS = STEPS | BY_HAND | LOSSES | MODULES | OPTIMIZERS | FIELDS | DETACHED
CHECKS = {
    SUPPORTED: (check_hypergradients, check_bit_identical),
    AS_PLAIN: (check_bit_identical,),
    SAID: (check_said,),
    REFUSED: (check_refused,),
    UNSEEN: (check_hypergradients, check_bit_identical),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if r.slow else n for n, r in LOOPS.items()])
def test_loop(name: str) -> None:
    row = LOOPS[name]
    for check in CHECKS[row.status]:
        check(row)
