"""The table of loops: optimizers × with and without a known length × variants, and what stands by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import lr_scheduler

import hypergrad
from experiments.same_numbers.loop import Loop

CLIP = 0.5

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip": CLIP},
    "accumulate": {"accumulate": 3},
    "accumulate_zeros": {"accumulate": 3, "zeros": True},
    "zeros": {"zeros": True},
    "nan": {"bad_batches": True},
    "batch_norm": {"batch_norm": True},
    "scaler": {"scaler": True},
    "scaler_clip": {"scaler": True, "clip": CLIP},
    "two": {"second": True},
    "two_clip": {"second": True, "clip": CLIP},
    "hot": {"bad_batches": True, "tuner": {"warm_start": False, "tune": {"lr": hypergrad.Hyperparameter(3.0)}}},
}


def step_lr(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lr_scheduler.StepLR(optimizer, steps // 3, 0.5)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1)


def one_cycle_of_lr_alone(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1, cycle_momentum=False)


ALL = ("lr", "weight_decay", "momentum")
BETAS = ("lr", "weight_decay", "betas", "eps")
ROWS: dict[str, Loop] = {
    # what is tuned
    "momentum": Loop(tuner={"tune": ALL}),
    "momentum_open": Loop(total=False, tuner={"tune": ALL}),
    "momentum_two": Loop(second=True, tuner={"tune": ALL}),
    "betas": Loop("adamw", tuner={"tune": BETAS}),
    "lr_alone": Loop(tuner={"tune": "lr"}),
    "bounds": Loop(tuner={"tune": {"lr": hypergrad.Hyperparameter(bounds=(1e-5, 1e-2)), "weight_decay": None}}),
    "groups": Loop(groups=True, tuner={"tune": ALL}),
    "penalty": Loop(penalty=True),
    "penalty_open": Loop("adamw", total=False, penalty=True),
    # an optimizer without an update rule
    "own": Loop("own"),
    "own_open_clip": Loop("own", total=False, clip=CLIP),
    # options
    "no_average": Loop(tuner={"average": False}),
    "no_warm_start": Loop("adamw", tuner={"warm_start": False}),
    "no_best": Loop(tuner={"keep_best": False}),
    "every_five": Loop(tuner={"every": 5, "hyper_lr": 0.2, "seed": 3}),
    "freeze": Loop("adam", freeze=True),
    "looks": Loop(looks=True, batch_norm=True),
    "looks_open": Loop("adamw", total=False, looks=True),
    "log": Loop(log=True),
    # beside schedulers
    "step_lr": Loop(total=False, scheduler=step_lr),
    "cosine": Loop("adamw", total=False, scheduler=cosine),
    "one_cycle": Loop(total=False, scheduler=one_cycle),
    "one_cycle_of_lr_alone": Loop("adam", total=False, scheduler=one_cycle_of_lr_alone),
    # what goes wrong, and what the tuner is not told
    "bad_validation": Loop(bad_validation=True),
    "bad_validation_open": Loop("adamw", total=False, bad_validation=True),
    "plain_steps": Loop(plain_steps=True),
    "changed": Loop(changed=True),
    "changed_clip": Loop("adam", total=False, changed=True, clip=CLIP),
    # from a file, half-way
    "resume": Loop(resume=True),
    "resume_momentum": Loop(resume=True, tuner={"tune": ALL}),
    "resume_open": Loop("adamw", total=False, resume=True),
    "resume_two_scaler": Loop("adamw", second=True, scaler=True, resume=True),
    "resume_cosine": Loop(total=False, scheduler=cosine, resume=True),
    "resume_penalty": Loop(penalty=True, resume=True),
    "resume_own": Loop("own", resume=True),
    "resume_hot": Loop(resume=True, **VARIANTS["hot"]),
    # whole steps
    **{
        f"step_{mode}_{name}": Loop(optimizer, total=False, step=True, clip=clip, tuner={"mode": mode})
        for mode in ("forward", "unrolled", "implicit")
        for name, optimizer, clip in (("sgd", "sgd", None), ("adamw_clip", "adamw", CLIP))
    },
    "step_unrolled_penalty": Loop(total=False, step=True, penalty=True, tuner={"mode": "unrolled"}),
    "step_unrolled_batch_norm_total": Loop("adam", step=True, batch_norm=True, tuner={"mode": "unrolled"}),
    "step_implicit_total": Loop(step=True, tuner={"mode": "implicit", "horizon": 5}),
    "step_forward_total_nan": Loop("adamw", step=True, bad_batches=True),
}

CASES: dict[str, Loop] = {
    f"{optimizer}_{'total' if total else 'open'}_{name}": Loop(optimizer, total, **variant)
    for optimizer in ("sgd", "adamw", "adam")
    for total in (False, True)
    for name, variant in VARIANTS.items()
} | ROWS
