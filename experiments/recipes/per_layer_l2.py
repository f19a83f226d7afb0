"""An L2 penalty for each layer, by implicit differentiation: train to a minimum, differentiate it, move the penalties, go on.

python -m experiments.recipes.per_layer_l2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

FEW, START = 150, 1e-2
data = datasets.digits()
x, x_val, x_test = (split.x.double() for split in data)
x, y, y_val, y_test = x[:FEW], data.train.y[:FEW], data.val.y, data.test.y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def loss(model: nn.Module, batch: None, hypers: dict[str, Tensor]) -> Tensor:
    """Cross-entropy and, for each layer, exp(log_l2) ‖W‖²/2."""
    squares = torch.stack([p.square().sum() / 2 for p in model.parameters() if p.ndim == 2])
    others = sum(p.square().sum() for p in model.parameters() if p.ndim == 1)  # so that the minimum is a point
    return cross_entropy(model(x), y) + hypers["log_l2"].exp() @ squares + 1e-4 * others


def train(model: nn.Module, hypers: dict[str, Tensor], steps: int) -> None:
    """To a minimum, or near to it, from where the model is."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, None, hypers)
        value.backward()
        return value

    optimizer.step(closure)


def main(outer_steps: int = 15) -> dict[str, float]:
    model = network()
    log_l2 = torch.full((2,), math.log(START), dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([log_l2], lr=0.5)
    solver = hypergrad.solvers.WarmStart(hypergrad.solvers.cg)  # each solve begins at the last one's answer
    still = torch.optim.SGD(model.parameters(), lr=1e-6)  # of one tiny step, after which the minimum is differentiated

    def val_loss() -> Tensor:
        return cross_entropy(model(x_val), y_val)

    values = []
    for _ in range(outer_steps):
        train(model, {"log_l2": log_l2.detach()}, 500)
        result = hypergrad.hypergradient(
            model,
            still,
            loss,
            [None],
            val_loss,
            wrt="log_l2",
            mode="implicit",
            hypers={"log_l2": log_l2.detach()},
            solver=solver,
        )
        values.append(float(result.value))
        log_l2.grad = result.gradients["log_l2"]
        outer.step()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    first, second = log_l2.detach().exp().tolist()
    return {
        f"validation loss at {START}": values[0],
        "validation loss": values[-1],
        "test accuracy": float(accuracy),
        "l2, first layer": first,
        "l2, second layer": second,
    }


if __name__ == "__main__":
    print(main())
