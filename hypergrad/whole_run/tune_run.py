"""`tune_run`: hyperparameters by gradient descent over whole training runs.

Every outer step trains anew from a seed's own start and differentiates all of it. Runs begin short: the first horizons are shares
of the run that cost little and whose hypergradients are seldom chaotic; each hands its best φ to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hypergrad.differentiate.modes import MODES, OPTIONS
from hypergrad.logging import Recorder, short
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.whole_run.outer_loop import OuterLoop, RunResult
from hypergrad.whole_run.resume import ResumeFile
from hypergrad.whole_run.run import Run
from hypergrad.whole_run.run_objective import Evaluation, WholeRunObjective
from hypergrad.whole_run.step_rules import RULES

FEW = 32  # numbers of one name that are recorded one by one
VERSION = 2  # of what is kept in a file
COMMON_OPTIONS = ("clip_norm", "clip_value", "ema")


def tune_run(
    build: Callable[..., Run],
    hypers: Mapping[str, Any],
    *,
    outer_steps: int = 20,
    outer: str = "adam",
    outer_lr: float = 0.1,
    seeds: Sequence[int] = (0,),
    horizons: Sequence[float] = (1 / 16, 1 / 4, 1.0),
    mode: str = "unrolled",
    log_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> RunResult:
    r"""Descend on the validation loss of a whole run, in its hyperparameters x = x(φ):

        φ ← φ − η σ D(dL/dφ),    L(φ) = 1/S Σ_s val_loss of the run of seed s

    with D as `outer` says. The next step is taken from the best φ so far; σ halves where the value got worse, or was not finite,
    and grows a little where it did not. Runs of one seed see the same batches and random numbers at every φ, so that values
    compare. A horizon's best φ goes on to the next horizon when progress stalls, or its share of the steps is used.

    Args:
        build: `build(seed)` → hypergrad.Run(model, optimizer, batches, loss, val_loss, val_steps=None, schedules=None), called
            anew for every evaluation, with torch's random numbers seeded by `seed`; horizons below 1 train on its first batches.
            `build(seed, horizon)` makes the shorter run itself, such as one whose schedule is as much shorter.
        hypers: name → hypergrad.Hyperparameter, number, tensor, net, or None for the value in the param groups. Names in
            param groups, of a clipping threshold, or of what loss or schedules read as `hypers[name]`. A tensor or net of your
            own may also be read from a closure, by val_loss too: it holds each step's values while the call runs, and is put
            back; `RunResult.values` has the best (of a net "name.parameter" → tensor). All are free, whatever their name.
        outer_steps: evaluations of all seeds, over all horizons, which have equal shares of them.
        outer: "adam", "sign" (each number's own step, halved when its hypergradient changes sign) or "sgd", in the transformed
            coordinate of each hyperparameter's kind: log for "positive", the value itself for "free".
        outer_lr: η, the length of the first step at a horizon: in φ for "adam" and "sign", times the hypergradient for "sgd".
        seeds: of the runs averaged over.
        horizons: shares of the run, increasing; the last one's is the objective.
        mode: of `hypergradient`, as are `options`: every, clip_norm, clip_value, ema, solver, look_back.
        log_dir: folder of TensorBoard events, metrics.jsonl and tune_run.json, from which a killed call goes on as if it had not
            been killed. A call with more `outer_steps` goes on too.
        resume: False: a file that exists already is an error.
        progress: True or False: a progress bar or none; None: one where stderr is a terminal.

    Raises:
        ValueError: an argument out of range, a file of another study in `log_dir`, a start that is not finite.

    Source: whole runs, Maclaurin et al. 2015 (arXiv 1502.03492); sign steps, Micaelli & Storkey 2021 (arXiv 2007.15869).

    Example:
        One step of gradient descent on θ²/2 from θ = 2 is best at lr 1.

        >>> def build(seed):
        ...     model = torch.nn.Linear(1, 1, bias=False)
        ...     _ = torch.nn.init.constant_(model.weight, 2.0)
        ...     loss = lambda model, batch: (model.weight ** 2).sum() / 2
        ...     return Run(model, torch.optim.SGD(model.parameters(), lr=0.1), [None], loss, lambda: loss(model, None))
        >>> found = tune_run(build, {"lr": 0.1}, outer="sign", outer_lr=1.0, outer_steps=20, horizons=(1.0,))
        >>> round(float(found.values["lr"][0]), 2)
        1.0
    """
    _check(build, hypers, outer_steps, outer, outer_lr, seeds, horizons, mode, options)
    objective = WholeRunObjective(build, hypers, seeds, {"mode": mode} | options)
    study = {
        "version": VERSION,
        "names": objective.hyper_vector.labels,
        "start": objective.start[0].tolist(),
        "bounds": torch.stack([objective.hyper_vector.low, objective.hyper_vector.high]).tolist(),
        "kinds": [h.kind for h in objective.hyper_vector.kinds],
        "outer": [outer, outer_lr],
        "seeds": list(seeds),
        "horizons": list(horizons),
        "mode": mode,
        "options": {name: x if isinstance(x, (int, float, str)) else _named(x) for name, x in options.items()},
        "run": [objective.steps, objective.n],
    }
    file = ResumeFile(log_dir, study)
    loop = OuterLoop(objective, tuple(horizons), outer, outer_lr, outer_steps, file.load(resume))
    objective.processes.check_same("the study of tune_run, and how far it has come,", (study, len(loop.history)))
    writes = objective.processes.rank == 0
    record = (
        None
        if log_dir is None or not writes
        else Recorder(log_dir, {"outer": outer, "outer_lr": outer_lr, "mode": mode}, _pages)
    )
    if record is not None and loop.history:
        record.go_on(loop.history[-1]["step"])
    bar = tqdm(
        total=outer_steps,
        initial=len(loop.history),
        desc="tune_run",
        unit="step",
        disable=True if not writes else None if progress is None else not progress,
    )
    with objective.own_tensors_put_back():
        try:
            while not loop.done():
                found = loop.step()
                if writes:
                    file.save(loop.state_dict())
                row = loop.history[-1]
                if record is not None:
                    record.scalars(row["step"], _scalars(objective.hyper_vector, row, found))
                bar.set_postfix(horizon=f"{row['horizon']:.3g}", value=f"{row['value']:.4g}")
                bar.update()
        finally:
            bar.close()
            if record is not None:
                record.close()
        return loop.result()


# ---- arguments


def _check(
    build: Any,
    hypers: Any,
    outer_steps: Any,
    outer: Any,
    outer_lr: Any,
    seeds: Any,
    horizons: Any,
    mode: Any,
    options: Any,
) -> None:
    if not callable(build):
        raise TypeError(f"build must be a function build(seed) -> hypergrad.Run, got {type(build).__name__}.")
    if not isinstance(hypers, Mapping):
        raise TypeError(
            f"hypers must be a dict name -> hypergrad.Hyperparameter or start, got {type(hypers).__name__}."
        )
    if not hypers:
        raise ValueError("hypers is empty: name what is to be tuned, such as {'lr': 0.1}.")
    if not _whole(outer_steps) or outer_steps < len(tuple(horizons)):
        raise ValueError(f"outer_steps must be a whole number, at least one a horizon, got {outer_steps!r}.")
    if outer not in RULES:
        raise ValueError(f"outer must be one of {', '.join(RULES)}, got {outer!r}.")
    if not (isinstance(outer_lr, (int, float)) and math.isfinite(outer_lr) and outer_lr > 0):
        raise ValueError(f"outer_lr must be a positive number, got {outer_lr!r}.")
    if not seeds or not all(map(_whole, seeds)) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, one at least, got {seeds!r}.")
    steps = list(horizons)
    if not steps or sorted(set(steps)) != steps or not 0 < steps[0] <= steps[-1] <= 1:
        raise ValueError(f"horizons must be increasing shares of the run, above 0 and at most 1, got {horizons!r}.")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    known = tuple(name for name in (*OPTIONS[mode], *COMMON_OPTIONS) if name != "below")
    for name in options:
        if name not in known:
            raise ValueError(f"mode={mode!r} of tune_run does not take {name!r}; it takes {', '.join(known)}.")


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _named(x: Any) -> str:
    return getattr(x, "__qualname__", None) or type(x).__name__


# ---- what is recorded


def _scalars(vector: HyperVector, row: Mapping[str, Any], found: Evaluation) -> dict[str, float]:
    out = _curves("hyper", vector.labels, vector.value) | _curves("hypergradient", vector.labels, found.gradient)
    run = {f"run/{name}": row[name] for name in ("horizon", "size", "run_equivalents")}
    return out | {"loss/val": row["value"]} | run


def _curves(prefix: str, labels: Sequence[str], x: Tensor) -> dict[str, float]:
    """One curve a number; of names that have many, the least, the mean and the largest."""
    names = [label.split("/")[0] for label in labels]
    many = {name for name in names if names.count(name) > FEW}
    out = {
        f"{prefix}/{label}": v
        for name, label, v in zip(names, short(labels), x.tolist(), strict=True)
        if name not in many
    }
    for name in sorted(many):
        mine = x[[n == name for n in names]]
        ends = {"least": mine.min(), "mean": mine.mean(), "largest": mine.max()}
        out |= {f"{prefix}/{name}/{end}": float(v) for end, v in ends.items()}
    return out


def _pages(tags: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's Custom Scalars tab."""
    pages = {"hyper": "hyperparameters", "hypergradient": "hypergradient in φ", "loss": "objective", "run": "run"}
    return {
        title: {tag.split("/", 1)[1]: ["Multiline", [f"^{tag}$"]] for tag in tags if tag.startswith(f"{head}/")}
        for head, title in pages.items()
    }
