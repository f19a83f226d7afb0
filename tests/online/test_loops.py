"""Every row of the loops: hypergradients against finite differences of the user's own loop, and its weights bit for bit."""

from __future__ import annotations

import pytest

from tests.online.live_loops import float64
from tests.online.loop_rows import AS_PLAIN, REFUSED, SAID, SUPPORTED, check_bit_identical, check_hypergradients
from tests.online.loop_rows import check_refused, check_said
from tests.online.loops_steps import STEPS

__all__ = ["float64"]  # the fixture
LOOPS = STEPS
CHECKS = {
    SUPPORTED: (check_hypergradients, check_bit_identical),
    AS_PLAIN: (check_bit_identical,),
    SAID: (check_said,),
    REFUSED: (check_refused,),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if r.slow else n for n, r in LOOPS.items()])
def test_loop(name: str) -> None:
    row = LOOPS[name]
    for check in CHECKS[row.status]:
        check(row)
