"""What a policy is: one rule of the online method, a frozen dataclass whose fields are its constants.

Some policies act around a training step (see loop.py): their `start` makes the object that does. The others shape a
hyperparameter step, in four passes down the list (see outer_optimizer.py):

    condition    what the hypergradient is taken to be
    propose      how far each number is to move
    limit        how far it may
    couple       numbers that move with others

Each pass hands a `Proposal` from one policy to the next. What a policy remembers is a dict of tensors [k], which it gets and
returns; the outer optimizer keeps it under the policy's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

State = dict[str, Tensor]  # name → [k]
P = TypeVar("P", bound="Policy")


@dataclass(frozen=True)
class HyperContext:
    """What a hyperparameter step is decided from. All tensors are [k], float64 or bool, on the CPU."""

    phi: Tensor  # φ before the step
    value: Tensor  # x(φ)
    low: Tensor  # bounds of φ
    high: Tensor
    tuned: Tensor  # bool: the numbers that are tuned at present; the rest stay
    given: Tensor  # bool: the user gave its start
    is_lr: Tensor  # bool: a learning rate, with φ its logarithm
    scaled: Tensor  # bool: φ is a logarithm or a logit
    outgrown: Tensor  # bool: lr or momentum whose tangent outgrew the weights since the last hyperparameter step
    newton: Tensor  # log c* of each lr (see NewtonClimb); NaN: not known
    # places of lr and weight decay, and of lr and momentum, of each group that has both, where lr is tuned at present
    lr_and_decay: Sequence[tuple[int, int]]
    lr_and_momentum: Sequence[tuple[int, int]]
    hyper_lr: float  # the user's step size on φ


@dataclass(frozen=True)
class Proposal:
    """A hyperparameter step in the making. All tensors are [k]."""

    gradient: Tensor  # dL/dφ as conditioned so far
    moves: Tensor  # bool: the numbers that move
    chaotic: Tensor  # bool: those that step down whatever their gradient says
    agreed: Tensor  # 1, −1, 0: the gradient and its running mean agree in sign, disagree, or one of them is 0
    down: Tensor  # how far φ is to go down
    phi: Tensor  # φ after the step
    moved_lr: tuple[tuple[int, int], ...] = ()  # pairs of `lr_and_momentum` whose lr/(1 − momentum) is held

    def but(self, **changes: object) -> Proposal:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Policy:
    """One rule. A subclass overrides the passes that it takes part in."""

    @property
    def name(self) -> str:
        """That under which its state is kept."""
        return type(self).__name__

    def init(self, k: int) -> State:
        """What it remembers of k numbers before the first hyperparameter step."""
        return {}

    def condition(self, c: HyperContext, p: Proposal, state: State, moments: State) -> Proposal:
        """moments: the state of `AdamOnPhi` before this step."""
        return p

    def propose(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        return p, state

    def limit(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        return p, state

    def couple(self, c: HyperContext, p: Proposal) -> Proposal:
        return p

    def rescaled(self, mine: Tensor, factor: float, state: State) -> State:
        """Values of the numbers `mine` [k] were multiplied by `factor` from outside a hyperparameter step."""
        return state

    def restarted(self, j: int, state: State) -> State:
        """Number j begins anew: what is remembered of it is as before the first step."""
        fresh, at = self.init(len(next(iter(state.values()), torch.empty(0)))), torch.tensor(j)
        return {name: x.index_copy(0, at[None], fresh[name][j : j + 1]) for name, x in state.items()}


def find(policies: Sequence[Policy], kind: type[P]) -> P | None:
    """The policy of a class; None where it is left out."""
    return next((policy for policy in policies if isinstance(policy, kind)), None)
