"""The transition stage: one update rule a file. A new optimizer is one file and one row of `RULES`.

An optimizer without a rule takes its own step, which is differentiated as it is (fallback.py).
"""

from __future__ import annotations

import torch

from hypergrad.updates.adam import Adam
from hypergrad.updates.rmsprop import RMSprop
from hypergrad.updates.rule import UpdateRule
from hypergrad.updates.sgd import SGD

RULES: dict[type[torch.optim.Optimizer], type[UpdateRule]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.RMSprop: RMSprop,
}


def rule_of(optimizer: torch.optim.Optimizer) -> type[UpdateRule] | None:
    """The rule of a live optimizer: that of its class, or of a base class whose `step` it inherits unchanged.

    None: it has none, and takes its own step.
    """
    for cls in type(optimizer).__mro__:
        if cls in RULES and type(optimizer).step is cls.step:
            return RULES[cls]
    return None
