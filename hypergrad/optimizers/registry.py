"""The registry of update rules. A new optimizer is one file in rules/ and one row of `RULES`.

An optimizer without a rule takes its own step, which is differentiated by tracing (traced/fallback.py).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from hypergrad.optimizers.rule import UpdateRule
from hypergrad.optimizers.rules.adadelta import Adadelta
from hypergrad.optimizers.rules.adafactor import Adafactor
from hypergrad.optimizers.rules.adagrad import Adagrad
from hypergrad.optimizers.rules.adam import Adam
from hypergrad.optimizers.rules.adamax import Adamax
from hypergrad.optimizers.rules.lamb import Lamb
from hypergrad.optimizers.rules.lion import Lion
from hypergrad.optimizers.rules.muon import Muon
from hypergrad.optimizers.rules.nadam import NAdam
from hypergrad.optimizers.rules.radam import RAdam
from hypergrad.optimizers.rules.rmsprop import RMSprop
from hypergrad.optimizers.rules.sgd import SGD

# A class of another package is listed by its dotted name, so that it is not imported here: who has an instance has imported it.
RULES: dict[type[torch.optim.Optimizer] | str, type[UpdateRule]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adamax: Adamax,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
    torch.optim.Adadelta: Adadelta,
    torch.optim.Adafactor: Adafactor,
    torch.optim.Muon: Muon,
    "pytorch_optimizer.Lion": Lion,
    "lion_pytorch.Lion": Lion,
    "pytorch_optimizer.Lamb": Lamb,
}


def rule_of(optimizer: torch.optim.Optimizer) -> type[UpdateRule] | None:
    """The rule of a live optimizer: that of its class, or of a base class whose `step` it inherits unchanged.

    None: it has none, and takes its own step.
    """
    rules = {_imported(key): rule for key, rule in RULES.items()}
    for cls in type(optimizer).__mro__:
        if cls in rules and unhooked_step(type(optimizer)) is unhooked_step(cls):
            return rules[cls]
    return None


def unhooked_step(cls: type) -> Any:
    """`step` without torch's wrapper, which is put around it in the class that is instantiated first."""
    step: Any = getattr(cls, "step", None)
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _imported(key: type | str) -> type | None:
    """The class of a row of RULES; None where it is named and nobody has imported its module."""
    if not isinstance(key, str):
        return key
    module, _, name = key.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
