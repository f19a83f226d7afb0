"""Gradients that are changed at every step in a way not known, or never come from `tuner.backward`: nothing can be tuned
then, so it is an error, which names the cause. Where they are known in some steps only, are stepped with twice, or are emptied
before the step, a warning says so.

g is the gradient as the optimizer sees it, r as `backward` left it (of the parameters that step), c = gᵀr/rᵀr, N = ‖r‖ of all:

    g = c r, c (N + ε) the same at two steps     clip_grad_norm_ at that threshold
    g = c r, c the same at two steps             multiplied: a GradScaler, a mean over something
    g = c r                                      clip_grad_norm_ over other tensors too, or another norm
    g = min(max(r, −M), M), M = max |g|          clip_grad_value_ at M
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.logging import Journal
from hypergrad.online.gradient_changes import Comparison, multiple_of, norm_error
from hypergrad.online.told_clipping import ToldClipping
from hypergrad.optimizers.clip import TORCH_EPS

PATIENCE = 20  # such steps in a row
OFTEN = 4 * PATIENCE  # steps, of which so many are such
_SAME = 1e-4  # relative
_REPLACE = (
    "Replace loss.backward() by tuner.backward(loss); in accelerate accelerator.backward(loss) by backward(accelerator, tuner, "
    "loss) of hypergrad.integrations.accelerate, in Lightning's manual optimization it is self.manual_backward(loss)."
)

REPEATED = (
    "optimizer.step() was called again without a backward in between (tuner.stats['repeated_steps']): it trains as always, with "
    "the same gradients once more, and each call counts as a training step, of total_steps too. If that is not meant, call "
    "optimizer.step() once after tuner.backward(loss)."
)
EMPTIED = (
    f"in {PATIENCE} steps in a row the gradients were emptied between tuner.backward(loss) and optimizer.step(), so that the "
    "steps change nothing and nothing can be tuned: call optimizer.zero_grad() before tuner.backward(loss), or after "
    "optimizer.step()."
)


class Scaling(NamedTuple):
    """g = c r: the factor, and the threshold that it would come from with its relative error."""

    factor: float
    threshold: float
    error: float


class UnknownChanges:
    """Says where gradients are not known, and counts the steps in a row in which they were changed, for each optimizer.

    Args:
        counts: what happened, for `tuner.stats`.
    """

    def __init__(self, journal: Journal, counts: dict[str, int]):
        self.journal, self.counts = journal, counts
        self.in_a_row: dict[int, int] = {}  # of the optimizers that `tuner.backward` gave gradients
        self.last: dict[int, Scaling | None] = {}
        self.plain: dict[int, int] = {}  # steps whose gradients came from elsewhere
        self.late: dict[int, deque[int]] = {}  # the last steps that were not known, while something was tuned
        self.told = ToldClipping(journal)
        # steps in a row whose gradients were emptied, and the last of them
        self.emptied: dict[int, tuple[int, int]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"in a row": [list(pair) for pair in self.in_a_row.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.in_a_row = {int(i): int(n) for i, n in state["in a row"]}

    def note(
        self, i: int, t: int, ours: bool, known: bool, comparison: Comparison | None, resting: bool, tuning: bool
    ) -> None:
        """Step t of optimizer i, through which tangents are taken.

        Args:
            ours: whether its gradients came from `tuner.backward`.
            known: whether their tangent is known.
            comparison: with what `backward` left; None: there is nothing to compare with.
            resting: a step without a product, whose gradients nobody compares.
            tuning: whether something is to be tuned at present.

        Raises:
            ValueError: where they were changed in so many steps in a row, or none came from `tuner.backward` so far.
        """
        if not ours or not (known or comparison):
            self.note_plain(i, t, tuning)
        elif comparison is not None and not known:
            self._note_changed(i, t, comparison, tuning)
        elif resting or comparison is None:
            self.in_a_row.setdefault(i, 0)
        else:
            self.in_a_row[i] = 0
            self.told.note(t, comparison)

    def note_repeated(self, t: int) -> None:
        """Step t is taken with the gradients of an earlier one once more."""
        self.counts["repeated_steps"] += 1
        self.journal.note_once(t, REPEATED)

    def note_emptied(self, i: int, t: int) -> None:
        """Optimizer i has no gradients at step t, though `tuner.backward` left some."""
        n, last = self.emptied.get(i, (0, t))
        n = n + 1 if t <= last + 1 else 1
        self.emptied[i] = n, t
        if n >= PATIENCE:
            self.journal.note_once(t, EMPTIED)

    def _note_changed(self, i: int, t: int, comparison: Comparison, tuning: bool) -> None:
        self.counts["changed_gradients"] += 1
        self.journal.note_once(
            t,
            "the gradients were changed between tuner.backward and optimizer.step in a way hypergrad does not know: "
            f"tangents start again from zero there (tuner.stats['changed_gradients']). {_what_to_pass(comparison)}",
        )
        n = self.in_a_row[i] = self.in_a_row.get(i, 0) + 1
        if tuning and n >= PATIENCE - 1:
            self._check_changed(i, n, comparison)
        if tuning:
            self._note_late(i, t)

    def _check_changed(self, i: int, n: int, comparison: Comparison) -> None:
        g, ref, norm = comparison.unknown()
        before, now = self.last.get(i), scaling(g, ref, norm)
        self.last[i] = now
        if n >= PATIENCE:
            raise ValueError(
                f"in {n} steps in a row the gradients were changed between tuner.backward and optimizer.step in a way hypergrad "
                f"does not know, so that nothing can be tuned: {_cause(before, now, clamped_at(g, ref))} If they are to stay as "
                "they are, call tuner.freeze() and train on without tuning."
            )

    def note_plain(self, i: int, t: int, tuning: bool) -> None:
        """Gradients that optimizer i steps with at step t did not come from `tuner.backward`.

        Raises:
            ValueError: where none did so far.
        """
        self.counts["plain_steps"] += 1
        self.journal.note_once(
            t,
            "a step's gradients did not come from tuner.backward(loss): it trains as always, but tangents start again "
            f"from zero there (tuner.stats['plain_steps']). {_REPLACE}",
        )
        n = self.plain[i] = self.plain.get(i, 0) + 1
        if n >= PATIENCE and tuning and i not in self.in_a_row:
            raise ValueError(
                f"none of the gradients of the first {n} steps came from tuner.backward(loss), so that nothing can be tuned. "
                f"{_REPLACE} If they are to stay as they are, call tuner.freeze(), or make the tuner where tuning begins."
            )
        if tuning:
            self._note_late(i, t)

    def _note_late(self, i: int, t: int) -> None:
        """Say it once more where such steps keep coming among others."""
        late = self.late.setdefault(i, deque(maxlen=PATIENCE))
        late.append(t)
        if len(late) == PATIENCE and t - late[0] < OFTEN:
            self.journal.note_once(
                t,
                f"of {OFTEN} steps {PATIENCE} or more had gradients that did not come from tuner.backward(loss), or were changed "
                "after it in a way hypergrad does not know: tangents look back no further than the last such step, so that "
                "values are tuned by what they do within a few steps, and may end far off. Mend it as the warning before this "
                "one says, or call tuner.freeze().",
            )


def _what_to_pass(comparison: Comparison) -> str:
    scaler = "scaler=... if it has a GradScaler."
    if comparison.clip is None:
        return f"Pass clip_norm=... or clip_value=... if the loop clips, once a step, after its last backward; {scaler}"
    told = f"{comparison.clip}={comparison.threshold:g}"
    return (
        f"They were not clipped as {told} says: clip at that threshold, once a step, after its last backward, all parameters of "
        f"the optimizer at once; pass {scaler}"
    )


def scaling(g: Tensor, ref: Tensor, norm: Tensor) -> Scaling | None:
    c, _, near = multiple_of(g, ref)
    if not near:
        return None
    return Scaling(float(c), float(c * (norm + TORCH_EPS)), norm_error(ref))


def clamped_at(g: Tensor, ref: Tensor) -> float | None:
    """The threshold of clip_grad_value_, where that is what was done."""
    m = g.abs().amax()
    off = (g - torch.clamp(ref, -m, m)).abs()
    return float(m) if bool((off <= 64 * torch.finfo(g.dtype).eps * m).all()) and bool(m > 0) else None


def _cause(before: Scaling | None, now: Scaling | None, clamp: float | None) -> str:
    if now is not None and now.factor == 0:
        return (
            "they were set to zero. Call optimizer.zero_grad() before tuner.backward(loss), or after optimizer.step()."
        )
    if now is None:
        if clamp is not None:
            return f"they were clipped by value. Pass clip_value={clamp:.6g}."
        return (
            "they are no multiple of what was left, nor clipped by value. Change them by a hook on each parameter "
            "(p.register_hook), which is differentiated, or change the loss; clipping must be over all parameters at once."
        )
    if before is not None and _alike(before.threshold, now.threshold, now.error):
        return f"their norm was clipped. Pass clip_norm={now.threshold:.6g}."
    if before is not None and _alike(before.factor, now.factor):
        by = f"{now.factor:.6g}"
        return (
            f"they were multiplied by {by}. Pass scaler=... if that is a GradScaler's, else multiply the loss by {by}."
        )
    return (
        "they were multiplied by a number that changes from step to step. Pass clip_norm=..., and give clip_grad_norm_ the "
        "optimizer's parameters alone, all of them, with norm_type=2."
    )


def _alike(a: float, b: float, error: float = 0.0) -> bool:
    return abs(a - b) <= (_SAME + error) * abs(b)
