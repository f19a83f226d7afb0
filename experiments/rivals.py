"""What a user would pick instead of hypergrad, each one live run of a workload: learning-rate-free optimizers and their like.

Each comes from its authors' package (`pip install -e '.[bench]'`) with that package's defaults, in the variant for the family of
the workload's optimizer (SGD with momentum 0.9; Adam for AdamW and RMSprop) where there is one. Weight decay is torch's
default for the workload's optimizer; DoG, which is a form of SGD, has SGD's. A schedule is used where the authors advise one.

    method           package                                   as its authors say
    default          torch                                     torch's default lr and weight decay, linear decay
    dadaptation      dadaptation (Defazio & Mishchenko 2023)   lr 1 × linear decay ("the scheduler you would normally use")
    prodigy          prodigyopt (Mishchenko & Defazio 2023)    lr 1 × linear decay (a schedule to zero, or none); Adam everywhere
    dog              dog-optimizer (Ivgi et al. 2023)          averaged weights; reps_rel 1e-4 with BatchNorm; SGD everywhere
    mechanic         mechanic-pytorch (Cutkosky et al. 2023)   lr 1 × linear decay, around torch's own optimizer
    schedule_free    schedulefree (Defazio et al. 2024)        no schedule; evaluated at its average, BatchNorm made anew there
    hd               none: 20 lines below (Baydin et al. 2018) torch's default lr to start from, β of the authors' MNIST runs
    gdtuo            gradient-descent-the-ultimate-optimizer   torch's default lr to start from, under SGD; it has no weight decay
    clarke           none: experiments/clarke.py               torch's default lr and weight decay (1e-4 where that is 0) to start
                     (Clarke et al. 2022)                      from, both tuned as published: no schedule
    hypergrad        this one                                  lr 1e-3, weight decay 1e-4

and `tpe`, Optuna's default sampler over whole plain runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from experiments.clarke import LookBack
from experiments.flops import gradient_evaluations
from experiments.pools import TRIAL_LR, TRIAL_WD
from experiments.workloads import RUNGS, Task, fit, train, train_tuned
from experiments.workloads.task import Batch

Row = dict[str, Any]
DEFAULTS = {"SGD": (1e-3, 0.0), "AdamW": (1e-3, 1e-2), "RMSprop": (1e-2, 0.0)}  # torch's lr and weight decay
HD_BETA = {"SGD": 1e-3, "AdamW": 1e-7, "RMSprop": 1e-7}  # of the authors' logistic regression and MLP; RMSprop as Adam
DOG_STEP = {False: 1e-6, True: 1e-4}  # reps_rel without, with BatchNorm
CLARKE_WD = 1e-4  # to start from where torch's default is 0, which has no logarithm
BATCHES = 50  # forward passes that renew BatchNorm's statistics, as schedule-free's authors have it


@dataclass(frozen=True)
class Method:
    """One live method: `train(task)` → the row of `fit`, and `gradient_evaluations` where these are not its steps."""

    title: str
    train: Callable[[Task], Row]
    package: str = ""  # its name for pip


@dataclass
class AtAverage(Task):
    """A task whose losses are read at other weights than those being trained: inside `average(task)`."""

    average: Callable[[Task], AbstractContextManager[None]]

    def evaluate(self, split: str) -> float:
        with self.average(self):
            return super().evaluate(split)


def _is_sgd(task: Task) -> bool:
    return task.workload.optimizer == "SGD"


def _weight_decay(task: Task) -> float:
    return DEFAULTS[task.workload.optimizer][1]


def _decayed(task: Task, optimizer: Any) -> Row:
    """The plain run, with another optimizer: its lr decays linearly to zero."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=task.steps)
    return fit(task, optimizer, Tensor.backward, schedule.step)


def default(task: Task) -> Row:
    return train(task, *DEFAULTS[task.workload.optimizer])


def dadaptation(task: Task) -> Row:
    package = import_module("dadaptation")
    if _is_sgd(task):
        return _decayed(task, package.DAdaptSGD(task.param_groups(), momentum=0.9))
    return _decayed(task, package.DAdaptAdam(task.param_groups(), weight_decay=_weight_decay(task), decouple=True))


def prodigy(task: Task) -> Row:
    return _decayed(task, import_module("prodigyopt").Prodigy(task.param_groups(), weight_decay=_weight_decay(task)))


def mechanic(task: Task) -> Row:
    kinds = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop}
    more = {"momentum": 0.9} if _is_sgd(task) else {}
    tuned = import_module("mechanic_pytorch").mechanize(kinds[task.workload.optimizer])
    return _decayed(task, tuned(task.param_groups(), lr=1.0, weight_decay=_weight_decay(task), **more))


def dog(task: Task) -> Row:
    package = import_module("dog")
    optimizer = package.DoG(task.param_groups(), reps_rel=DOG_STEP[_has_batchnorm(task.model)])
    averager = package.PolynomialDecayAverager(task.model)

    @contextmanager
    def average(at: Task) -> Iterator[None]:
        trained, at.model = at.model, averager.averaged_model
        yield
        at.model = trained

    try:
        return fit(AtAverage(**vars(task), average=average), optimizer, Tensor.backward, averager.step)
    except AssertionError:  # its own check on the gradients' squares, which a NaN fails
        return dict.fromkeys([*RUNGS, "test", "seconds"], math.nan)


def schedule_free(task: Task) -> Row:
    package = import_module("schedulefree")
    if _is_sgd(task):
        optimizer = package.SGDScheduleFree(task.param_groups())
    else:
        optimizer = package.AdamWScheduleFree(task.param_groups(), weight_decay=_weight_decay(task))

    @contextmanager
    def average(at: Task) -> Iterator[None]:
        optimizer.eval()
        if _has_batchnorm(at.model):
            with torch.no_grad():
                for x in islice(at.data.train.x.split(at.workload.batch), BATCHES):
                    at.model(x)
        yield
        optimizer.train()

    optimizer.train()
    return fit(AtAverage(**vars(task), average=average), optimizer, Tensor.backward)


def _has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class HypergradientDescent:
    """Baydin et al. 2018 (arXiv 1703.04782), additive rule, around any optimizer: lr ← lr − β ∂loss/∂lr before each step.

    ∂loss/∂lr = g_t · ∂θ_t/∂lr, and ∂θ_t/∂lr = (θ_t − θ_{t−1}) / lr: of SGD −g_{t−1}, so that lr grows by β g_t·g_{t−1}; of Adam
    its direction, decoupled weight decay included. One lr for all parameters, kept positive.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, beta: float):
        self.optimizer, self.beta, self.lr = optimizer, beta, optimizer.param_groups[0]["lr"]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.before: list[Tensor] = []
        self.zero_grad = optimizer.zero_grad

    @torch.no_grad()
    def step(self) -> None:
        moved = zip(self.parameters, self.before)
        slope = sum(((p - old).flatten() @ p.grad.flatten()).item() for p, old in moved if p.grad is not None) / self.lr
        self.lr = max(self.lr - self.beta * slope, 1e-10)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.before = [p.clone() for p in self.parameters]
        self.optimizer.step()


def hd(task: Task) -> Row:
    lr, weight_decay = DEFAULTS[task.workload.optimizer]
    inner = task.make_optimizer(lr, weight_decay)
    optimizer: Any = HypergradientDescent(inner, HD_BETA[task.workload.optimizer])
    return fit(task, optimizer, Tensor.backward)


class Tower:
    """gdtuo's wrapper of a module behind an optimizer's interface; it replaces the module's parameters at every step."""

    def __init__(self, wrapper: Any):
        self.wrapper, self.zero_grad = wrapper, wrapper.zero_grad
        self.recurrent = [module for module in wrapper.module.modules() if isinstance(module, nn.RNNBase)]
        wrapper.initialize()
        wrapper.begin()

    def step(self) -> None:
        self.wrapper.step()
        for module in self.recurrent:  # these hold their weights twice, and compute with the other list
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        self.wrapper.begin()


def gdtuo(task: Task) -> Row:
    """The stack of its README (Adam under SGD 1e-5), and the like: SGD under SGD with that class's default, 0.01."""
    package = import_module("gradient_descent_the_ultimate_optimizer.gdtuo")
    lr = DEFAULTS[task.workload.optimizer][0]
    stack = {
        "SGD": lambda: package.SGD(lr, 0.9, optimizer=package.SGD()),
        "AdamW": lambda: package.Adam(lr, optimizer=package.SGD(1e-5)),
        "RMSprop": lambda: package.RMSProp(lr, 0.99, optimizer=package.SGD(1e-5)),
    }[task.workload.optimizer]()
    optimizer: Any = Tower(package.ModuleWrapper(task.model, optimizer=stack))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        return fit(task, optimizer, lambda loss: loss.backward(create_graph=True))


@dataclass
class LookedAt(Task):
    """A task whose batches are shown to `look` before they are trained on."""

    look: Callable[[Batch], None]

    def batches(self) -> Iterator[Batch]:
        for batch in super().batches():
            self.look(batch)
            yield batch


def clarke(task: Task) -> Row:
    lr, weight_decay = DEFAULTS[task.workload.optimizer]
    optimizer = task.make_optimizer(lr, weight_decay or CLARKE_WD)
    rival = LookBack(task.model, optimizer, task.loss, task.val_loss, seed=task.seed)
    row = fit(LookedAt(**vars(task), look=rival.look), optimizer, Tensor.backward, rival.move)
    ended = {f"end_{name}": values.log().mean().exp().item() for name, values in rival.values.items()}
    return row | ended | {"gradient_evaluations": gradient_evaluations(rival.stats)}


def hypergrad(task: Task) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs are counted
        return train_tuned(task, lr=1e-3, weight_decay=1e-4)


METHODS: dict[str, Method] = {
    "hypergrad": Method("hypergrad, its defaults", hypergrad),
    "default": Method("torch's default lr, linear decay", default),
    "dadaptation": Method("D-Adaptation", dadaptation, "dadaptation"),
    "prodigy": Method("Prodigy", prodigy, "prodigyopt"),
    "dog": Method("DoG", dog, "dog-optimizer"),
    "mechanic": Method("Mechanic", mechanic, "mechanic-pytorch"),
    "schedule_free": Method("schedule-free", schedule_free, "schedulefree"),
    "hd": Method("hypergradient descent (Baydin)", hd),
    "clarke": Method("look-back, Clarke et al.", clarke),
    "gdtuo": Method("gdtuo", gdtuo, "gradient-descent-the-ultimate-optimizer"),
}


def installed(package: str) -> str | None:
    """ "name version", or None where it is not there."""
    try:
        return f"{package} {metadata.version(package)}" if package else ""
    except metadata.PackageNotFoundError:
        return None


def tpe(build: Callable[[int], Task], seed: int, trials: int) -> Row:
    """Optuna's TPE over log lr and log weight decay, as wide as pools.py's trials: the row of its best plain run by validation.

    Trial i runs on seed 1000 · seed + i. A run without a validation loss is told as infinitely bad.
    """
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    rows, seconds = [], 0.0
    for i in range(trials):
        trial = study.ask()
        lr = trial.suggest_float("lr", 10.0 ** TRIAL_LR[0], 10.0 ** TRIAL_LR[1], log=True)
        weight_decay = trial.suggest_float("weight_decay", 10.0 ** TRIAL_WD[0], 10.0 ** TRIAL_WD[1], log=True)
        task = build(1000 * seed + i)
        row = train(task, lr, weight_decay)
        study.tell(trial, row["val"] if math.isfinite(row["val"]) else math.inf)
        rows.append(row | {"lr": lr, "weight_decay": weight_decay, "gradient_evaluations": trials * task.steps})
        seconds += row["seconds"]
    best = min(rows, key=lambda row: row["val"] if math.isfinite(row["val"]) else math.inf)
    return best | {"seconds": round(seconds, 3)}
