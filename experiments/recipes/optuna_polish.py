"""Optuna proposes what has no derivative, and a tuner in every trial polishes lr and weight decay.

python -m experiments.recipes.optuna_polish
"""

from __future__ import annotations

import optuna
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

data = datasets.digits()
x_tune, y_tune = (part[:200] for part in data.val)  # tunes,
x_select, y_select = (part[200:] for part in data.val)  # and selects


def objective(trial: optuna.Trial, steps: int) -> float:
    width = trial.suggest_int("width", 8, 128, log=True)
    activation = trial.suggest_categorical("activation", ["relu", "tanh"])
    batch = trial.suggest_categorical("batch", [16, 64])
    torch.manual_seed(trial.number)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU() if activation == "relu" else nn.Tanh(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-6)

    def val_loss() -> Tensor:
        return cross_entropy(model(x_tune), y_tune)

    tuner = hypergrad.Tuner(model, optimizer, val_loss, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(data.train.y), (batch,))
        optimizer.zero_grad()
        tuner.backward(cross_entropy(model(data.train.x[rows]), data.train.y[rows]))
        optimizer.step()
    tuner.close()
    for name in ("lr", "weight_decay"):
        trial.set_user_attr(name, float(tuner.values[name]))
    with torch.no_grad():
        return cross_entropy(model(x_select), y_select).item()


def main(trials: int = 10, steps: int = 300) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    study.optimize(lambda trial: objective(trial, steps), n_trials=trials)
    best = study.best_trial
    values = sorted(trial.value for trial in study.trials if trial.value is not None)
    return {
        "best": values[0],
        "median": values[len(values) // 2],
        "width": best.params["width"],
        "lr": best.user_attrs["lr"],
        "weight decay": best.user_attrs["weight_decay"],
    }


if __name__ == "__main__":
    print(main())
