"""Train a classifier of digits whose lr and weight decay start 1000 times wrong, and tune them while it trains.

python -m experiments.quickstart [--quick]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad
from experiments import datasets, flops, results
from experiments.arguments import arg, command, parse
from hypergrad.logging import Recorder


@dataclass
class Args:
    """Tune lr and weight decay online on scikit-learn's digits, and compare with what one would do otherwise."""

    steps: int = arg(2000, "training steps of each run", quick=200)
    trials: int = arg(16, "trials of the random search", quick=2)
    lr: float = arg(1e-4, "learning rate to start from: about 1000 times too small")
    weight_decay: float = arg(1e-6, "weight decay to start from: about 1000 times too small")
    seed: int = arg(0, "seed of weights, batches and search")
    device: str = arg("cpu", "where to train: cpu or cuda")
    out: str = arg("runs/quickstart", "folder of the results; each run's logs get a folder in it")
    made_up: bool = arg(False, "made-up clusters in the place of the digits, which scikit-learn has")
    quick: bool = arg(False, "a few steps only: a test of the machinery")


class Job(NamedTuple):
    """What a training loop is made of; ``hypergrad.check`` takes the same things."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Iterator[tuple[Tensor, Tensor]]
    val_loss: Callable[[], Tensor]
    test_accuracy: Callable[[], float]


def job(args: Args, lr: float, weight_decay: float) -> Job:
    data = (datasets.clusters() if args.made_up else datasets.digits()).to(args.device)
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(args.steps):
            picked = torch.randint(len(data.train.y), (64,), device=args.device)
            yield data.train.x[picked], data.train.y[picked]

    def val_loss() -> Tensor:
        return loss(model, data.val)

    @torch.no_grad()
    def test_accuracy() -> float:
        return (model(data.test.x).argmax(1) == data.test.y).float().mean().item()

    return Job(model, optimizer, loss, batches(), val_loss, test_accuracy)


def train_tuned(args: Args, log_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The loop to copy: a plain training loop, with a tuner and ``tuner.backward`` in it."""
    model, optimizer, loss, batches, val_loss, test_accuracy = job(args, args.lr, args.weight_decay)
    tuner = hypergrad.Tuner(
        model, optimizer, val_loss, tune=("lr", "weight_decay"), total_steps=args.steps, seed=args.seed, log_dir=log_dir
    )
    curve = []
    for step, batch in enumerate(bar := tqdm(batches, total=args.steps, desc="tuned online", disable=None)):
        train_loss = loss(model, batch)
        optimizer.zero_grad()
        tuner.backward(train_loss)  # in place of train_loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            lr, weight_decay = (tuner.values[name].item() for name in ("lr", "weight_decay"))
            curve.append({"step": step, "val_loss": val_loss().item(), "lr": lr, "weight_decay": weight_decay})
            bar.set_postfix_str(f"val loss {curve[-1]['val_loss']:.3f}  lr {lr:.2g}  weight decay {weight_decay:.2g}")
    tuner.close()
    row = {"lr": curve[-1]["lr"], "weight_decay": curve[-1]["weight_decay"], "val_loss": val_loss().item()}
    return row | {
        "test_accuracy": test_accuracy(),
        "gradient_evaluations": flops.gradient_evaluations(tuner.stats),
    }, curve


def train_plain(args: Args, lr: float, weight_decay: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same loop without hypergrad; its lr decays to zero as the tuned one does."""
    model, optimizer, loss, batches, val_loss, test_accuracy = job(args, lr, weight_decay)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    curve = []
    for step, batch in enumerate(batches):
        train_loss = loss(model, batch)
        optimizer.zero_grad()
        train_loss.backward()
        optimizer.step()
        decay.step()
        if step % 10 == 0 or step == args.steps - 1:
            losses = {"train_loss": train_loss.item(), "val_loss": val_loss().item()}
            curve.append({"step": step, **losses, "lr": lr, "weight_decay": weight_decay})
    row = {"lr": lr, "weight_decay": weight_decay, "val_loss": val_loss().item()}
    return row | {"test_accuracy": test_accuracy(), "gradient_evaluations": args.steps}, curve


def log(args: Args, curve: list[dict[str, Any]], log_dir: Path) -> None:
    """A plain run for TensorBoard, under the tags of a tuned one: its curves stand in the same charts."""
    levels = {"hyper/lr_scale": curve[0]["lr"], "hyper/weight_decay": curve[0]["weight_decay"]}
    levels |= {tag.replace("/", "/log10_"): math.log10(value) for tag, value in levels.items()}
    recorder = Recorder(log_dir, {f"{name}/0 start": curve[0][name] for name in ("lr", "weight_decay")})
    for point in curve:
        applied = {"lr/applied": point["lr"] * (1 - point["step"] / args.steps)}
        losses = {"loss/train": point["train_loss"], "loss/val": point["val_loss"]}
        recorder.scalars(point["step"] + 1, {**levels, **applied, **losses})
    recorder.close()


def random_search(args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best of so many random trials by validation loss; its cost is the cost of all."""
    rng = np.random.default_rng(args.seed)
    print(f"random search of {args.trials} runs, to compare with ...", flush=True)
    tried = [train_plain(args, 10 ** rng.uniform(-5, 0), 10 ** rng.uniform(-7, -1)) for _ in range(args.trials)]
    row, curve = min(tried, key=lambda trial: trial[0]["val_loss"] if math.isfinite(trial[0]["val_loss"]) else math.inf)
    return row | {"gradient_evaluations": args.steps * args.trials}, curve


def main(args: Args) -> list[dict[str, Any]]:
    from experiments import figures  # here: the loops above do without matplotlib

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave --device away")
    torch.set_num_threads(1)  # the model is tiny
    folder = Path(args.out, time.strftime("%Y%m%d-%H%M%S"))
    tuned = folder / "tuned"
    runs = {
        "tuned by hypergrad": (tuned, lambda: train_tuned(args, tuned)),
        "untuned": (folder / "untuned", lambda: train_plain(args, args.lr, args.weight_decay)),
        "untuned, torch's default lr": (folder / "lr 1e-3", lambda: train_plain(args, 1e-3, args.weight_decay)),
        f"random search, best of {args.trials}": (folder / f"best of {args.trials}", lambda: random_search(args)),
    }
    rows, curves = [], []
    for name, (log_dir, train) in runs.items():
        began = time.perf_counter()
        row, curve = train()
        if log_dir != tuned:  # the tuner writes its own
            log(args, curve, log_dir)
        rows.append({"method": name, "seed": args.seed, **row, "seconds": round(time.perf_counter() - began, 2)})
        curves += [{"method": name, **point} for point in curve]

    results.write(Path(args.out, "quickstart.json"), command(args), rows, args.device)
    results.write(Path(args.out, "quickstart_curves.json"), command(args), curves, args.device)
    figures.quickstart(curves).savefig(folder / "curves.png", dpi=130)
    print(f"\n{'':<29}{'lr':>9}{'weight decay':>14}{'test accuracy':>15}{'gradient evaluations':>22}")
    for row in rows:
        print(
            f"{row['method']:<29}{row['lr']:>9.2g}{row['weight_decay']:>14.2g}{row['test_accuracy']:>15.1%}"
            f"{row['gradient_evaluations']:>22,}"
        )
    tensorboard = Path(sys.executable).with_name("tensorboard")  # the environment's own, which need not be in PATH
    print(f"\ncurves   {folder / 'curves.png'}")
    print(f"browse   {tensorboard if tensorboard.exists() else 'tensorboard'} --logdir {folder.resolve()}")
    return rows


if __name__ == "__main__":
    main(parse(Args))
