"""Do the results of a compiled graph agree with those of the eager code?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hypergrad.core.float64 import widest
from hypergrad.differentiate.compile.placeholders import REMEDY

# relative difference from the eager code beyond which a graph is refused
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 5e-2  # of other dtypes
SINGLE = 30  # times that for single numbers, which may be small differences of large ones


def disagreement(found: Any, truth: Any) -> int:
    """0 where all agrees; 1 where only single numbers differ, which may be by chance; 2 where vectors do."""
    worst = 0
    for a, b in zip(tree_leaves(found), tree_leaves(truth), strict=True):
        if a is None or b is None:
            if a is not b:
                return 2
            continue
        if a.shape != b.shape:
            return 2
        if not b.is_floating_point():
            worst = worst if torch.equal(a, b) else 2
            continue
        single, tolerance = b.numel() == 1, TOLERANCE.get(b.dtype, COARSE)
        a, b = a.to(widest(a.device)), b.to(widest(b.device))
        size, difference = float(torch.linalg.vector_norm(b)), float(torch.linalg.vector_norm(a - b))
        if math.isnan(difference):
            worst = worst if torch.equal(a.isfinite(), b.isfinite()) else 2
        elif difference > (SINGLE if single else 1) * tolerance * size:
            worst = max(worst, 1 if single else 2)
    return worst


def refusal(what: str) -> ValueError:
    return ValueError(
        f"compile=True: a compiled step is not what the loss computes: {what}. A graph holds what Python did when it was traced; "
        "the loss may depend on something in Python that changes from step to step (a counter, a list, a number). Put it into "
        f"the batches, as tensors. {REMEDY}"
    )
