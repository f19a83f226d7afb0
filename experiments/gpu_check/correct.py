"""The checks of `correct`, most valuable first."""

from __future__ import annotations

from experiments.gpu_check import exact, loops
from experiments.gpu_check.rows import Check

CHECKS: dict[str, Check] = {
    **exact.IN_FRONT,
    **loops.ONLINE_CHECKS,
    **loops.QUICKSTART,
    **exact.REPLAYS,
    **loops.LOOP_CHECKS,
    **exact.LAYERS,
    **loops.OTHERS,
    **loops.WAITS,
    **exact.COMPILE,
    **exact.REST,
}
