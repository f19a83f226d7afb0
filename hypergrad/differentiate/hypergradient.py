"""`hypergradient`: exact hypergradients of a trajectory of training, by any mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.data_parallel import processes_of
from hypergrad.core.loss_tensors import LossTensors
from hypergrad.core.problem import Problem
from hypergrad.core.restore import Rng
from hypergrad.core.user_warnings import warn_user
from hypergrad.differentiate.arguments import (
    Optimizers,
    as_optimizers,
    check_names,
    clipping,
    granularity,
    of_no_effect,
)
from hypergrad.differentiate.compile.compiled import compiled
from hypergrad.differentiate.eager import EagerStepper
from hypergrad.differentiate.modes import MODES, OPTIONS
from hypergrad.differentiate.schedule_gradients import Function, Schedules
from hypergrad.differentiate.stepper import Stepper
from hypergrad.differentiate.trajectory import Result, Trajectory
from hypergrad.differentiate.wrt import Directions
from hypergrad.optimizers.ema import Averaged, check_decay
from hypergrad.optimizers.transition import Transition


def hypergradient(
    model: torch.nn.Module,
    optimizer: Optimizers,
    loss: Callable[..., Tensor],
    batches: Iterable[Any],
    val_loss: Callable[..., Tensor],
    wrt: str | Sequence[str] = ("lr", "weight_decay"),
    mode: str = "unrolled",
    hypers: Mapping[str, Any] | None = None,
    per_step: bool = False,
    val_steps: Sequence[int] | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    schedules: Mapping[str, Function] | None = None,
    per: str | Mapping[str, str] = "group",
    ema: float | None = None,
    compile: bool = False,
    **options: Any,
) -> Result:
    r"""Differentiate a validation loss in hyperparameters, through training steps.

    The steps are θ, s ← Φ(θ, s, h, batch) for every batch in turn, from the optimizer's present state s; computed is

        dL/dh,   L(h) = val_loss at θ_K(h), or its mean over `val_steps`.

    Model, optimizer, buffers, gradients and random numbers are left as they were found.

    Args:
        model: the module that is trained; in DistributedDataParallel, or around it, the mean over ranks is differentiated.
        optimizer: a live optimizer or a list of them: torch.optim's SGD, Adam, AdamW, RMSprop, Adagrad, Adamax, NAdam, RAdam,
            Adadelta, Adafactor, Muon; Lion of pytorch_optimizer or lion_pytorch; Lamb of pytorch_optimizer; any other
            through its own step, slowly, or it is refused (docs/optimizers.md).
        loss: `loss(model, batch)` → scalar, or `loss(model, batch, hypers)`:
            `hypers` is passed where a third positional argument is required, or is `None` or a dict by default; else the loss
            may read them from a closure.
        batches: one batch a step; K in all. A lazy sequence (`len(batches)`, `batches[t]`) is asked for batch t whenever step t
            is computed, and must give the same one.
        val_loss: `val_loss()` → scalar, computed with the model's own parameters, deterministic; called as `val_loss(t)`,
            t the number of steps done, where it has a required argument, or one `t=None`.
        wrt: names in param_groups (lr, weight_decay, momentum, dampening, betas, alpha, eps, rho, lr_decay, momentum_decay,
            initial_accumulator_value, beta2_decay, d, ns_coefficients), "clip_norm", "clip_value" or "ema" where given, and keys
            of `hypers`; () for `Result.initial` alone, with mode="unrolled". Of a name that has a schedule, the derivative in a
            number added to its value: at each step with per_step, else at every step (the sum of those).
        mode: "unrolled" (adjoint; any number of hyperparameters), "forward" (tangents; any number of steps) or "implicit"
            (the minimum that training came to).
        hypers: name → tensor, net or number that the loss and schedules read as `hypers[name]`. A tensor or net of your own is
            differentiated in as it is, so that loss and val_loss may also read it from a closure; what depends on it in val_loss
            itself is part of the gradient. Of a net the gradients are `gradients["name.parameter"]`, and "name" in `wrt`
            stands for all of them. One in `wrt` that nothing reads is an error.
        per_step: one gradient per step, for schedules: a leading dimension [K].
        val_steps: numbers of completed steps, 0 … K, at which the validation loss is taken; None: K alone.
        clip_norm: threshold of `clip_grad_norm_` over all parameters, between gradient and step.
        clip_value: threshold of `clip_grad_value_`.
        schedules: name in param_groups, "clip_norm", "clip_value" or "ema" → function f(step, hypers), step = 0 … K − 1, that
            returns the value itself, not a factor as LambdaLR's function does (of that, `lambda t, h: base_lr * lr_lambda(t)`):
            a number, a scalar tensor, or one for each param group; for betas a pair, or a pair for each group. It replaces
            the number in param_groups. Tensors of `hypers` that it computes with get a gradient through it, by autograd.
            `hypergrad.schedules` has shapes of schedules.
        per: "group"; "parameter", one derivative for each parameter tensor; or "element", one for each element (of update rules
            that act elementwise); or a mapping from names in param_groups to these. For "element" gradients have shape [n], or
            [n, 2]: `[x.view_as(p) for x, p in zip(gradient.split([p.numel() for p in params]), params)]`, with params in the
            order of the optimizer's groups, has them in the parameters' shapes. mode="forward" takes at most 4096 of them.
        ema: decay d of an average of the weights, a ← d a + (1 − d) θ after every step, a = θ at the start; `val_loss` is then
            computed with the averaged weights in the model (and the buffers of training). Not for mode="implicit".
        compile: steps and their derivatives by torch.compile (mode="unrolled" and "forward"; needs a C++ compiler on CPU).
            The first call compiles for ten seconds to a minute, later ones with the same model, optimizer and loss do not. What
            Python code in the loss does is taken to be the same at every step; this is checked against the eager code
            (docs/modes.md). Graphs of steps are not kept: where a state and a gradient of every step fit into `graph_memory`,
            these are.
        options: mode="unrolled": `graph_memory`, bytes that graphs of steps may take up (default 1 GiB): all are kept where they
            fit, else as many as fit of the steps that are replayed; `every`, steps between checkpoints (default √K; no graphs
            are kept where it is given); `offload`, where all checkpoints but the newest few go: "host" memory of a GPU's machine,
            "disk" (a temporary folder) or a folder; device memory is then independent of K; `below`, a value: where the
            validation loss is not at most this, gradients are not computed, and are NaN.
            mode="implicit": `solver`, a function solve(matvec, b) such as `hypergrad.solvers.neumann` or `nystrom` (default cg; a
            `hypergrad.solvers.WarmStart` starts from the last call's answer), or `look_back`, a number of terms of the update
            map's own series.

    Returns:
        Result, with `.value`, `.gradients` and `.stats`. Gradients are in the value itself, not in a transform of it.
        With mode="unrolled" also `.initial`: dL/dθ₀, the derivative in the weights before the first step, for each parameter:
        the meta-gradient of MAML (Finn et al. 2017, arXiv 1703.03400, eq. 1). With a task's inner steps as `batches` and its
        query loss as `val_loss`, the mean of `.initial` over tasks is what the outer optimizer descends along.

    Raises:
        ValueError: unknown names, no batches, losses that are not scalars or do not depend on the parameters, a derivative
            that does not exist (SGD momentum at exactly 0 with dampening or nesterov, Adafactor's d at exactly 1, coupled weight
            decay of Lion at exactly 0).
        NotImplementedError: optimizers, flags and layers that cannot be differentiated (docs/layers.md); the message says
            what to do instead.

    Example:
        One step of gradient descent on θ²/2 from θ = 2 at lr η: L = (2 − 2η)²/2, dL/dη = −2 (2 − 2η) = −3.6 at η = 0.1.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> half_square = lambda model, batch: (model.weight ** 2).sum() / 2
        >>> r = hypergradient(model, sgd, half_square, [None], lambda: half_square(model, None), wrt="lr")
        >>> round(float(r.value), 4), round(float(r.gradients["lr"][0]), 4)
        (1.62, -3.6)

        Two steps at lr 0.1 c and 0.1 c², c = 1: θ = 2 (1 − 0.1 c)(1 − 0.1 c²), dL/dc = θ dθ/dc = 1.62 · (−0.54) = −0.8748; and
        dL/dθ₀ = 1.62 · 0.81 = 1.3122.

        >>> r = hypergradient(model, sgd, half_square, [None] * 2, lambda: half_square(model, None), "c",
        ...                   hypers={"c": 1.0}, schedules={"lr": lambda t, h: 0.1 * h["c"] ** (t + 1)})
        >>> round(float(r.gradients["c"]), 4), round(float(r.initial[0]), 4)
        (-0.8748, 1.3122)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    run, mode_options = _choose(mode, per_step, val_steps, ema, options)
    given = LossTensors(hypers)
    tensors = given.leaves
    clip, threshold = clipping(clip_norm, clip_value)
    names = given.expanded((wrt,) if isinstance(wrt, str) else wrt)
    if not names and mode != "unrolled":
        raise ValueError("wrt=() leaves Result.initial alone, which mode='unrolled' has: pass names, or that mode.")
    stage, optimizers = Transition if ema is None else Averaged, as_optimizers(optimizer)
    processes = processes_of(model, optimizers)
    if compile and not processes.alone:
        raise NotImplementedError("compile=True does not go with several processes: leave it out.")
    transition = stage(optimizers, frozenset({*names, *(schedules or ())}), clip)
    values = transition.values() | ({} if clip is None else {clip: [threshold]})
    if isinstance(transition, Averaged):
        values |= transition.decays(check_decay(ema, "ema"))  # type: ignore[arg-type]
    check_names(names, values, tensors)
    scheduled = Schedules(schedules or {}, tensors, values, given.given)
    finely = granularity(per, [name for name in names if name in values])
    rng = Rng(transition.params[0].device)
    lazy = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    items: Any = batches if lazy else list(batches)  # a DataLoader draws from the global generator here
    rng.restore()
    if not len(items):
        raise ValueError("batches is empty: pass at least one batch.")
    steps = len(items)
    problem = Problem(model, transition.params, loss, given, transition.optimizers, processes)
    directions = Directions(transition, names, tensors, steps if per_step else None, finely, scheduled)
    when = (steps,) if val_steps is None else tuple(val_steps)
    if not when or not all(int(t) == t and 0 <= t <= steps for t in when):
        raise ValueError(f"val_steps must be numbers of completed steps from 0 to {steps}, got {val_steps}.")
    processes.check_same("the number of batches, and val_steps,", (steps, when))
    with given.differentiable():
        every_steps = scheduled.evaluate(steps, transition)
        trajectory = Trajectory(problem, transition, items, every_steps, directions, val_loss, when)
        stepper: Stepper = compiled(trajectory, mode) if compile else EagerStepper(trajectory)
        result = run(trajectory, stepper, **mode_options)
        result.stats |= stepper.stats()
    useless = None if mode == "implicit" else of_no_effect(values, scheduled.functions, names)
    if useless:
        result.stats["warnings"].append(useless)
        warn_user(useless)
    return result


def _choose(
    mode: str, per_step: bool, val_steps: Any, ema: float | None, options: dict[str, Any]
) -> tuple[Callable[..., Result], Any]:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    for name in options:
        if name not in OPTIONS[mode]:
            takes = ", ".join(OPTIONS[mode]) or "no options"
            raise ValueError(f"mode={mode!r} does not take {name!r}; it takes {takes}.")
    if mode == "implicit" and (per_step or val_steps is not None):
        raise NotImplementedError(
            "mode='implicit' differentiates the point reached, not the steps to it: per_step and val_steps need "
            "mode='unrolled' or 'forward'."
        )
    if mode == "implicit" and ema is not None:
        raise NotImplementedError(
            "mode='implicit' differentiates the point reached, not the average of the weights over the steps to it: ema needs "
            "mode='unrolled' or 'forward'."
        )
    return MODES[mode], options
