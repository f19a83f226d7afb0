"""The online method is this list of policies. Each is one file: its formula, its constants as fields, its evidence."""

from __future__ import annotations

from collections.abc import Sequence

from hypergrad.online.policies.adam_on_phi import AdamOnPhi
from hypergrad.online.policies.agreement_pace import AgreementPace
from hypergrad.online.policies.backtracking import Backtracking
from hypergrad.online.policies.chaos_ceiling import ChaosCeiling
from hypergrad.online.policies.clip_outliers import ClipOutliers
from hypergrad.online.policies.divergence_guard import DivergenceGuard
from hypergrad.online.policies.lr_decay_coupling import LrDecayCoupling
from hypergrad.online.policies.lr_momentum_coupling import LrMomentumCoupling
from hypergrad.online.policies.lr_warm_start import LrWarmStart
from hypergrad.online.policies.mean_trust_region import MeanTrustRegion
from hypergrad.online.policies.momentum_start import MomentumStart
from hypergrad.online.policies.newton_climb import NewtonClimb
from hypergrad.online.policies.phases import Phases
from hypergrad.online.policies.policy import Policy
from hypergrad.online.policies.slow_descent import SlowDescent
from hypergrad.online.policies.weight_decay_sizing import WeightDecaySizing

DEFAULT: tuple[Policy, ...] = (
    # around training steps
    Phases(),
    MomentumStart(),
    LrWarmStart(),
    WeightDecaySizing(),
    DivergenceGuard(),
    Backtracking(),
    # at a hyperparameter step
    ChaosCeiling(),
    LrDecayCoupling(),
    LrMomentumCoupling(),
    ClipOutliers(),
    AdamOnPhi(),
    AgreementPace(),
    SlowDescent(),
    NewtonClimb(),
    MeanTrustRegion(),
)


def without(policies: Sequence[Policy], *kinds: type[Policy]) -> tuple[Policy, ...]:
    """A list of policies, some left out.

    Raises:
        ValueError: where one of them is not in the list.

    Example:
        >>> len(DEFAULT) - len(without(DEFAULT, NewtonClimb, Phases))
        2
    """
    missing = [kind.__name__ for kind in kinds if not any(isinstance(policy, kind) for policy in policies)]
    if missing:
        raise ValueError(f"not in the list of policies: {', '.join(missing)}.")
    return tuple(policy for policy in policies if not isinstance(policy, kinds))


def replaced(policies: Sequence[Policy], policy: Policy) -> tuple[Policy, ...]:
    """A list of policies with one of them as given, in its place.

    Raises:
        ValueError: where none of its class is in the list.

    Example:
        >>> replaced(DEFAULT, AdamOnPhi(beta1=0.5))[10]
        AdamOnPhi(beta1=0.5, memory=4.0, beta2=0.99)
    """
    if not any(type(old) is type(policy) for old in policies):
        raise ValueError(f"not in the list of policies: {type(policy).__name__}.")
    return tuple(policy if type(old) is type(policy) else old for old in policies)


def check(policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """The list as a tuple; raises what is wrong with it."""
    found = tuple(policies)
    for policy in found:
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policies must be a list of hypergrad.policies, for example without(DEFAULT, Backtracking), got {policy!r}."
            )
    names = [policy.name for policy in found]
    if len(set(names)) < len(names):
        raise ValueError("a policy stands twice in policies: use hypergrad.policies.replaced to change its constants.")
    if not any(isinstance(policy, AdamOnPhi) for policy in found):
        raise ValueError("policies must hold AdamOnPhi(): it makes the step that the others shape.")
    return found
