"""What a tuner is given, validated before anything of the user's is read or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from hypergrad.optimizers.transition import CLIPS, Transition

MOST_UNASKED = 16  # numbers that are tuned in forward mode without mode="forward" written out


NO_COPY = (
    "a Tuner cannot be copied or pickled: copy the model and the optimizer, make a new Tuner of the copies, and give it the "
    "state with its load_state_dict(copy.deepcopy(tuner.state_dict()))."
)


def check_objects(model: Any, val_loss: Any, scaler: Any, on_log: Any) -> None:
    if isinstance(model, (list, tuple)):
        raise TypeError("model must be a torch.nn.Module: put several into one, torch.nn.ModuleList([model, other]).")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not callable(val_loss):
        raise TypeError("val_loss must be a function () -> scalar tensor.")
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}.")
    if on_log is not None and not callable(on_log):
        raise TypeError(f"on_log must be a function (metrics, step), got {type(on_log).__name__}.")


def check_numbers(mode: str, horizon: int, every: int, hyper_lr: float, total_steps: int | None) -> None:
    if mode not in ("forward", "unrolled", "implicit"):
        raise ValueError(f"mode must be 'forward', 'unrolled' or 'implicit', got {mode!r}.")
    for name, x in (("horizon", horizon), ("every", every), ("total_steps", total_steps)):
        if x is not None and (not isinstance(x, int) or isinstance(x, bool) or x < 1):
            raise ValueError(f"{name} must be a whole number from 1, got {x!r}.")
    if not (isinstance(hyper_lr, (int, float)) and math.isfinite(hyper_lr) and hyper_lr > 0):
        raise ValueError(f"hyper_lr must be a positive number, got {hyper_lr!r}.")


def check_cost(cost: float | None, plan: Any, mode: str) -> None:
    if cost is not None and (not isinstance(cost, (int, float)) or isinstance(cost, bool) or not cost > 1):
        raise ValueError(
            "cost must be a number above 1, the seconds of a tuned run over those of a plain one, or None, no bound; got "
            f"{cost!r}."
        )
    if plan is not None and mode != "forward":
        raise ValueError(
            f"a plan says in which steps tuner.backward forms products: leave it out with mode={mode!r}, whose cost `horizon` "
            "and `every` set."
        )


def check_few(k: int) -> None:
    """k: numbers that are tuned in forward mode, which nobody asked for."""
    if k > MOST_UNASKED:
        raise ValueError(
            f"{k} numbers are to be tuned, and tuner.backward (mode='forward') carries a tangent and forms a Hessian product in "
            f"every step for each of them; above {MOST_UNASKED} it does so only when asked. Pass mode='unrolled' and loss=..., "
            "and call tuner.step(batch): its cost does not depend on their number. Or tune fewer, or pass mode='forward'."
        )


def check_names_to_tune(written: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """written: names of param groups; tensors: of the loss."""
    if not written and not tensors:
        raise ValueError("nothing to tune: name hyperparameters, for example tune=('lr', 'weight_decay').")
    if any(name in CLIPS for name in written):
        raise NotImplementedError("a clipping threshold cannot be tuned online: use hypergrad.hypergradient for it.")
    if "initial_accumulator_value" in written:
        raise NotImplementedError(
            "initial_accumulator_value acts before the first step alone: use hypergrad.hypergradient for it."
        )


def check_groups(transition: Transition) -> None:
    """Raise where a param group was added since."""
    if transition.grown:
        raise ValueError(
            "param groups were added in mid-run. Either hold all parameters in the optimizer from the start, those of later "
            "frozen by requires_grad_(False), and unfreeze them; or call tuner.close(), give the old groups the lr in "
            "tuner.values and the new one that of its neighbours, and make a new Tuner with warm_start=False, and total_steps "
            "the steps that are left."
        )
