"""What was done to the gradients between `tuner.backward` and `optimizer.step()`, found without waiting for the device.

p.grad is compared with what `backward` left there:

    g' = g                     J = I
    g' = g/scale               J = I/scale                               with `scaler`
    g' = c g, c < 1            J = c (I − g gᵀ/(N (N + ε)))              with `clip_norm`, N = ‖g‖, c = M/(N + ε)
    g' = min(max(g, −M), M)    J = diag(|g| ≤ M)                         with `clip_value`
    anything else              unknown: the tangents start again from zero

Between two calls of `backward` gradients may have been zeroed, all of them or some: then what earlier calls left there is void.
All comparisons are of flat vectors [n], in a number of kernels that does not grow with that of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hypergrad.core.multi_tensor import norms
from hypergrad.core.readout import Readout
from hypergrad.optimizers.clip import TORCH_EPS, total_norm
from hypergrad.optimizers.transition import Transition

NEAR = 64  # times the precision: elements, and numbers made of a few, are the same


@dataclass
class Pending:
    """What `backward` left for the step to use."""

    # a copy of every p.grad [n], 0 where there is none; None: nothing is tuned, and nothing compared
    left: Tensor | None
    has: tuple[bool, ...]  # the parameters that have one
    dg: Tensor | None  # tangent of the gradient [k, n]; None is zero
    losses: dict[frozenset[int], Tensor]  # the largest of those accumulated, by the optimizers they reach, times scale
    scale: float  # of a GradScaler at the time
    changed: Tensor | None = None  # [n_params] bool: changed before more was added to it; None: nothing was added
    stepped: set[int] = field(default_factory=set)  # the optimizers that have used it
    coupled: bool = False  # a loss reads parameters of several optimizers
    survives: Tensor | None = None  # 0-d bool, while more is added: not all of it was zeroed
    averaged: bool = False  # dg is the mean of the processes'
    # `column_sums` of what this process left there before the mean was taken; None: not known
    own: Tensor | None = None

    def forget_tangent(self) -> None:
        """The gradient's tangent is zero."""
        self.dg = None

    def used_by(self, optimizer: int) -> None:
        self.stepped.add(optimizer)

    def joined(self, more: Pending) -> Pending:
        """One more call of `backward` added to what `carried_on` returned. more: with the sum of both in `left`."""
        dg = more.dg
        if self.dg is not None:
            dg = self.dg if dg is None else self.dg + dg
        changed = self.changed if more.changed is None or self.changed is None else self.changed | more.changed
        return replace(
            more,
            has=tuple(a or b for a, b in zip(self.has, more.has, strict=True)),
            dg=dg,
            losses=self._joined_losses(*more.losses.items()),
            changed=changed,
            coupled=more.coupled or (self.coupled and not self.stepped),
            averaged=self.averaged and more.averaged,
        )

    def _joined_losses(self, new: tuple[frozenset[int], Tensor]) -> dict[frozenset[int], Tensor]:
        to, loss = new
        if self.stepped:  # the others were of a step that is done
            return {to: loss}
        nothing = torch.full_like(loss, -math.inf)
        old = self.losses
        if self.survives is not None:  # False: what is there was zeroed
            old = {key: torch.where(self.survives, x, nothing) for key, x in old.items()}
        return old | {to: torch.maximum(old.get(to, nothing), loss)}

    def loss_of(self, optimizer: int) -> Tensor:
        """The largest of the losses that reach an optimizer, or of all, where none does."""
        mine = [x for key, x in self.losses.items() if optimizer in key] or list(self.losses.values())
        return mine[0] if len(mine) == 1 else torch.stack(mine).amax()

    def is_own(self, optimizer: int, others: Collection[int]) -> bool:
        """Whether it is a loss of this optimizer's own: not all of them reach it, or others have stepped before there was one."""
        shared = len(self.losses) == 1 or all(optimizer in key for key in self.losses)
        return not shared or bool(others and not self.stepped)


def reached(transition: Transition, has: Sequence[bool]) -> frozenset[int]:
    """The optimizers of the parameters that have a gradient."""
    pairs = zip(transition.group_of, has, strict=True)
    return frozenset(transition.optimizer_of_group[group] for group, h in pairs if h)


def carried_on(pending: Pending, transition: Transition) -> Pending | None:
    """What is left of an earlier call of `backward` at the next one. None where no gradient is there any more.

    So after every step, after one that GradScaler skipped, and where optimizers take turns.
    """
    grads = [p.grad for p in transition.params]
    if all(g is None for g, has in zip(grads, pending.has, strict=True) if has):
        return None
    now, sizes = transition.flatten(grads), transition.sizes
    left = now if pending.left is None else pending.left
    there = any_of_each(torch.stack([left != 0, now != 0, now != left]), sizes)
    void = there[0] & ~there[1]  # zeroed, or None
    survives = (there[0] & there[1]).any()
    keep, changed = ~void & survives, there[2] & ~void
    if pending.changed is not None:
        changed = changed | (pending.changed & ~void)
    dg = pending.dg
    if dg is not None:
        dg = torch.where(_spread(keep, sizes), dg, 0)
    has = tuple(h and g is not None for h, g in zip(pending.has, grads, strict=True))
    return replace(pending, has=has, dg=dg, changed=changed & survives, survives=survives)


def any_of_each(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """Whether there is a flag [m, n] in the range of each parameter [m, n_params]."""
    rows = [x for row in flags.to(torch.float32) for x in row.split(list(sizes))]
    return norms(rows, 1).view(len(flags), -1) > 0


def _spread(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """A flag of each parameter [n_params] at each of its elements [n]."""
    repeats = torch.tensor(list(sizes), device=flags.device)
    return torch.repeat_interleave(flags, repeats, output_size=sum(sizes))


def multiple_of(g: Tensor, ref: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether g = c ref [n].

    c is that of the largest element, which is as exact as numbers are. A quotient of sums over all n is not: roundings add up.

    Returns:
        c; the largest |ref|; whether the other elements have that c too, False for NaN. Each 0-d.

    Example:
        >>> [x.item() for x in multiple_of(torch.tensor([1.0, -2.0]), torch.tensor([2.0, -4.0]))]
        [0.5, 4.0, True]
    """
    size = ref.abs()
    where = size.argmax().view(1)
    largest, c = size.gather(0, where)[0], (g.gather(0, where) / ref.gather(0, where))[0]
    off, unit = (g - c * ref).abs(), NEAR * torch.finfo(g.dtype).eps * c.abs()
    return c, largest, (off <= unit * largest + unit * size).all()


def norm_error(ref: Tensor) -> float:
    """By how much two norms of a vector [n], summed in different orders, may differ, over the norm.

    n roundings of either sign add up to about √n times the precision of float32, in which half precision is summed too; some
    kernels sum block by block, and come out a few times as far off.
    """
    sums = torch.promote_types(ref.dtype, torch.float32)
    return 4 * math.sqrt(len(ref)) * torch.finfo(sums).eps


class Comparison:
    """The gradients as the optimizer will see them, beside what `backward` left; what tells is asked of `readout`.

    Args:
        g: p.grad of the active parameters [n], 0 elsewhere.
        active: the parameters of the optimizer that is about to step which have a gradient.
        clip: "clip_norm" or "clip_value" and its threshold; None: the loop does not clip.
        scaled: whether the loop has a GradScaler.
    """

    def __init__(
        self,
        pending: Pending,
        transition: Transition,
        g: Tensor,
        active: Sequence[bool],
        clip: tuple[str | None, float],
        scaled: bool,
        readout: Readout,
    ):
        self.pending, self.scaled, self.g = pending, scaled, g
        self.clip, self.threshold = clip
        self.clipped: bool | None = None  # see `note_clipping`
        assert pending.left is not None
        part = self.left = pending.left
        if not all(active):
            part = transition.flatten([x if a else None for x, a in zip(transition.split(part), active, strict=True)])
        readout.ask("same", (g == part).all())
        if pending.changed is not None:
            readout.ask("changed", pending.changed)
        self.active, self.sizes = active, transition.sizes
        self.ref = self.part = part
        if self.clip is None and not scaled:
            return
        self.ref = self.left if pending.scale == 1 else self.left / pending.scale
        self.part = self.ref if part is self.left else part / pending.scale
        part, self.rtol = self.part, NEAR * torch.finfo(g.dtype).eps
        if self.clip == "clip_value":
            off = (g - part.clamp(-self.threshold, self.threshold)).abs()
            readout.ask("clamped", (off <= self.rtol * part.abs()).all())  # False for NaN
            if scaled:
                readout.ask("unscaled", ((g - part).abs() <= self.rtol * part.abs()).all())
            return
        self.c, largest, near = multiple_of(g, part)
        self.norm = total_norm(self.ref, transition.sizes)
        own = self.norm if part is self.ref else total_norm(part, transition.sizes)  # of the parameters that step
        readout.ask("scaling", torch.stack([largest, self.c, self.norm, near.to(g.dtype), own]))

    def keep_one(self, read: Mapping[str, list[float]]) -> None:
        """Of two equal vectors keep one."""
        if read["same"][0] == 1 and self.part is self.left:
            self.pending.left = self.left = self.part = self.ref = self.g

    def note_clipping(self, read: Mapping[str, list[float]]) -> None:
        """Whether gradients above the threshold were clipped; None: there are none, or they were changed in another way.

        The norm is that of the parameters that step, which is no larger than that of all: those of several optimizers may be
        clipped together, or each by itself.
        """
        same = read["same"][0] == 1
        if "clamped" in read:
            clamped, same = bool(read["clamped"][0]), same or bool(read.get("unscaled", [0.0])[0])
            self.clipped = None if clamped == same else clamped
        elif self.clip == "clip_norm":
            largest, c, _, near, own = read["scaling"]
            if not (near == 1 and 0 < largest < math.inf):
                return
            if not (same or (self.scaled and abs(c - 1) < self.rtol)):
                self.clipped = True if c < 1 else None
            elif own > self.threshold * (1 + max(1e-3, 4 * self.rtol, norm_error(self.part))):
                self.clipped = False

    def tangent(self, read: Mapping[str, list[float]], k: int) -> Tensor | None:
        """The tangent of the gradients as the optimizer will see them [k, n]; None where that is not known.

        Rows are right in the ranges of the active parameters.
        """
        changed = read.get("changed", [0.0] * len(self.active))
        if any(x and a for x, a in zip(changed, self.active, strict=True)):
            return None
        left = self.left
        dg = left.new_zeros(k, len(left)) if self.pending.dg is None else self.pending.dg
        if read["same"][0] == 1:
            return dg
        if "clamped" in read:
            if not read["clamped"][0]:
                return dg / self.pending.scale if read.get("unscaled", [0.0])[0] else None
            return torch.where(self.ref.abs() > self.threshold, 0, dg / self.pending.scale)
        if "scaling" not in read:
            return None
        return self._through_scaling(read["scaling"], dg / self.pending.scale, any(changed))

    def unknown(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient as the optimizer sees it and as `backward` left it, unscaled [n], 0 where it does not step; all's norm."""
        left = self.left / self.pending.scale if self.scaled else self.left
        return self.g, self.part, total_norm(left, self.sizes)

    def _through_scaling(self, numbers: Sequence[float], dg: Tensor, changed: bool) -> Tensor | None:
        """J dg for a gradient g = c·ref; a norm is that of the whole ref."""
        largest, c, n, near, _ = numbers
        if not (0 < largest < math.inf and near == 1):
            return None
        if self.scaled and abs(c - 1) < self.rtol:
            return dg
        if self.clip is None or c > 1 + self.rtol or changed:
            return None
        if abs(c * (n + TORCH_EPS) / self.threshold - 1) > self.rtol + norm_error(self.ref):
            return None  # clipped at another threshold, or over other parameters too
        ref, c_, n_ = self.ref, self.c, self.norm
        return torch.addcmul(c_ * dg, (dg @ ref).unsqueeze(-1) * (-c_ / (n_ * (n_ + TORCH_EPS))), ref)
