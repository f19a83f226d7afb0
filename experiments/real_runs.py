"""What `experiments.resnet` and `experiments.gpt` share: which runs, in which order, within a limit of time, and one run.

Every run trains the same net from the same seed for the same number of steps, lr with a warm-up over 1 % of the steps and a
linear decay to zero. In order, most valuable first:

    default     plain, lr and weight decay as torch's optimizer has them where nothing is typed
    tuned       by `hypergrad.Tuner(cost=…)` from a start of lr, weight decay 1e-4: the first start at the first cost,
    recipe      then the plain run by the code that `tuner.recipe()` of it prints,
                then the other start at that cost, and both at the other costs
    grid        plain, points of a grid, of which the best by validation loss is the row of kind "best of grid"

A row of kind "run" has

    val, test, accuracy          mean losses over the whole sets at the end in eval mode, accuracy on the test set; null where the
                                 run diverged
    seconds, seconds_over_plain  of training, readings of the curves left out; over those of the default run. On a GPU by the
                                 clock, the device waited for; on a CPU the processor's, as other programs do not slow those
    end_lr, end_weight_decay     the peak of lr (tuned: where it was tuned to), and weight decay
    products_a_step, stride      Hessian products over steps; the plan's, null without one
    bytes                        peak of allocated memory, on a GPU
    recipe, doubts               of a tuned run: the code, and how many things it says against itself

rows of kind "curve" the losses at `points` places of a run. `OUT/tensorboard/RUN` has the same for TensorBoard, and the tuner's
own log. Finished runs are kept in `OUT/NAME.jsonl` and not run again; the result is written anew after each.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import hypergrad
from experiments import results
from experiments.arguments import arg, command
from experiments.sweep import finished, one_thread, sweep
from hypergrad.schedules import scheduler as warmup_and_decay

Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]
START_WD = 1e-4
SLACK = 1.1  # on the seconds that a run is thought to take
PROBE = 5  # steps that are timed where nothing is known yet, after as many that are not
NOT_A_KEY = ("minutes", "starts", "costs", "grid_lr", "grid_wd", "out", "quick", "data_dir", "text")  # change no run


@dataclass
class Common:
    """What both scripts are asked."""

    device: str = arg("cuda", "cuda or cpu", quick="cpu")
    dtype: str = arg("bf16", "of the arithmetic: bf16 (autocast) or fp32")
    steps: int = arg(1000, "training steps of a run", quick=12)
    batch: int = arg(128, "examples of a training batch", quick=8)
    val_batch: int = arg(0, "examples of a reading of val_loss; 0: as many as of a training batch")
    starts: tuple = arg((1e-6, 1e-1), "learning rates that tuned runs start from")
    costs: tuple = arg((2.0, 1.5, 1.15), "of the tuner, in their order", quick=(2.0,))
    grid_lr: tuple = arg((0.1,), "learning rates of the grid, in their order; 0: no grid")
    grid_wd: tuple = arg((5e-4,), "weight decays of the grid, in their order")
    points: int = arg(8, "readings of the validation set for the curves of a run", quick=2)
    seed: int = arg(0, "of weights, batches and val_loss")
    minutes: float = arg(0.0, "no run begins that would end later; 0: no limit")
    out: str = arg("runs", "folder of finished runs, result and logs")
    quick: bool = arg(False, "a few steps of a tiny net on the CPU: a test of the machinery")


class Training(NamedTuple):
    """A net about to be trained once.

    Attributes:
        optimizer: `optimizer(params, **numbers)`; without numbers torch's defaults.
        batches: of the run, one a step.
        loss: `loss(batch)` → scalar.
        val_loss: the loss of a validation batch drawn with torch's global random numbers.
        evaluate: "val" or "test" → loss and accuracy over the whole set, in eval mode.
    """

    model: nn.Module
    optimizer: Callable[..., torch.optim.Optimizer]
    batches: Iterator[Batch]
    loss: Callable[[Batch], Tensor]
    val_loss: Callable[[], Tensor]
    evaluate: Callable[[str], tuple[float, float]]


Build = Callable[[Any], Training]


class Watch:
    """Seconds between `start` and `stop`: on the wall, the device waited for at both; on a CPU the processor's."""

    def __init__(self, device: str):
        self.cuda, self.seconds, self._began = device.startswith("cuda"), 0.0, 0.0

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self.seconds += self._now() - self._began

    def _now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


# ---- which runs


def name_of(item: Row) -> str:
    """The run's name, for people and for folders."""
    if item["run"] in ("tuned", "recipe"):
        return f"{item['run']} from {item['start_lr']:g} at cost {item['cost']:g}"
    return "default" if item["run"] == "default" else f"grid lr {item['lr']:g} weight decay {item['weight_decay']:g}"


def items(args: Common, name: str, data: str) -> list[Row]:
    """Every run, most valuable first. data: what it is trained on, in words."""
    same = {"experiment": name, "data": data, "card": results.environment(args.device)["device"]}
    same |= {k: v for k, v in asdict(args).items() if k not in (*NOT_A_KEY, *same)}
    tuned = [{"run": "tuned", "start_lr": lr, "cost": args.costs[0]} for lr in args.starts]
    if tuned:
        tuned.insert(1, tuned[0] | {"run": "recipe"})
    others = [{"run": "tuned", "start_lr": lr, "cost": cost} for cost in args.costs[1:] for lr in args.starts]
    grid = [{"run": "grid", "lr": lr, "weight_decay": wd} for lr in args.grid_lr if lr for wd in args.grid_wd]
    return [same | item for item in ({"run": "default"}, *tuned, *others, *grid)]


def of(item: Row, rows: list[Row]) -> Row | None:
    """The finished run of an item."""
    return next((row for row in rows if item.items() <= row.items()), None)


def seconds_needed(item: Row, done: list[Row], probe: float) -> float:
    """What a run would take in all, curves and building too, by those done; `probe`: of a plain run, where none is."""
    plain = [row["whole_seconds"] for row in done if row["run"] != "tuned"]
    one = max(plain) if plain else probe
    if item["run"] != "tuned":
        return SLACK * one
    like = [row["whole_seconds"] for row in done if row["run"] == "tuned" and row["cost"] == item["cost"]]
    return SLACK * (max(like) if like else item["cost"] * one)


# ---- one run


def probe(build: Build, args: Common) -> float:
    """Seconds of a plain run by a few of its steps; kernels are loaded by then."""
    with one_thread():
        began = time.perf_counter()
        made, watch = build(args), Watch(args.device)
        built = time.perf_counter() - began
        optimizer = made.optimizer(made.model.parameters())
        for step, batch in zip(range(2 * PROBE), made.batches, strict=False):
            if step == PROBE:
                watch.start()
            loss = made.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        watch.stop()
        reading = Watch(args.device)
        reading.start()
        made.evaluate("val")
        reading.stop()
    return built + watch.seconds / PROBE * args.steps + (args.points + 1) * reading.seconds


def run(build: Build, args: Common, done: list[Row], item: Row) -> Row:
    """One item: the row that is kept."""
    began = time.perf_counter()
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    made = build(args)
    log, tuner, schedule = Path(args.out, "tensorboard"), None, None
    if item["run"] == "recipe":
        tuned = of(item | {"run": "tuned"}, done)
        assert tuned is not None
        names: Row = {"model": made.model}
        exec(tuned["recipe"], names)  # what its row has from `tuner.recipe()`: pasted, as a user would
        optimizer, schedule = names["optimizer"], names["scheduler"]
    elif item["run"] == "tuned":
        optimizer = made.optimizer(made.model.parameters(), lr=item["start_lr"], weight_decay=START_WD)
        tuner = hypergrad.Tuner(
            made.model, optimizer, made.val_loss, total_steps=args.steps, cost=item["cost"], seed=args.seed,
            log_dir=log / name_of(item) / "tuner",
        )  # fmt: skip
    else:
        numbers = {name: item[name] for name in ("lr", "weight_decay") if name in item}
        optimizer = made.optimizer(made.model.parameters(), **numbers)
        schedule = warmup_and_decay(optimizer, args.steps)
    start = optimizer.param_groups[0].get("initial_lr"), optimizer.param_groups[0]["weight_decay"]
    with warnings.catch_warnings(), SummaryWriter(log / name_of(item)) as writer:
        warnings.simplefilter("ignore")  # roll-backs, which the row counts
        row = train(made, optimizer, args, tuner, schedule, writer)
        if tuner is not None:
            row |= of_tuner(tuner)
            tuner.close()
        else:
            row |= {"end_lr": start[0], "end_weight_decay": start[1]}
    if args.device.startswith("cuda"):
        row["bytes"] = torch.cuda.max_memory_allocated()
    row["weights"] = sum(p.numel() for p in made.model.parameters())
    return item | row | {"whole_seconds": round(time.perf_counter() - began, 3)}


def train(
    made: Training, optimizer: torch.optim.Optimizer, args: Common, tuner: Any, schedule: Any, writer: SummaryWriter
) -> Row:
    """The training loop; losses, seconds, and the curve. A plain run whose loss is not finite at a point of its curve ends."""
    backward = Tensor.backward if tuner is None else tuner.backward
    at = {max(args.steps * i // args.points, 1) for i in range(1, args.points + 1)}
    curve: list[Row] = []
    row: Row = {"val": math.nan, "test": math.nan, "accuracy": math.nan, "seconds": math.nan}
    total, last, watch = torch.zeros((), device=args.device), 0, Watch(args.device)
    watch.start()
    for step, batch in enumerate(made.batches, start=1):
        loss = made.loss(batch)
        optimizer.zero_grad()
        backward(loss)
        used = float(optimizer.param_groups[0]["lr"])  # of a plain step
        optimizer.step()
        if schedule is not None:
            schedule.step()
        total += loss.detach()
        if step not in at:
            continue
        watch.stop()
        val, accuracy = made.evaluate("val")
        lr = used if tuner is None else float(tuner.applied["lr"].mean())
        point = {"train": float(total) / (step - last), "val": val, "val_accuracy": accuracy, "lr": lr}
        for tag, x in point.items():
            writer.add_scalar(f"curve/{tag}", x, step)
        curve.append(results.finite({"step": step, **point, "seconds": round(watch.seconds, 3)}))
        total.zero_()
        last = step
        if tuner is None and not math.isfinite(point["train"]):
            return row | {"steps_done": step, "curve": curve}
        watch.start()
    row["val"] = val
    row["test"], row["accuracy"] = made.evaluate("test")
    return row | {"seconds": round(watch.seconds, 3), "steps_done": args.steps, "curve": curve}


def of_tuner(tuner: hypergrad.Tuner) -> Row:
    """What a tuned run's row has beside losses."""
    stats, recipe = tuner.stats, tuner.recipe()
    return {
        **{f"end_{name}": float(values.mean()) for name, values in tuner.values.items()},
        "products_a_step": stats["hessian_products"] / stats["steps"],
        "stride": None if tuner.plan is None else tuner.plan.stride,
        "every": None if tuner.plan is None else tuner.plan.every,
        "rollbacks": stats["rollbacks"],
        "backtracks": stats["backtracks"],
        "recipe": str(recipe),
        "doubts": len(recipe.doubts),
    }


# ---- all of them


def result_rows(todo: list[Row], kept: list[Row]) -> list[Row]:
    """The rows of the result: the best of the grid, runs in their order, their curves."""
    done = [row for item in todo if (row := of(item, kept)) is not None]
    plain = next((row["seconds"] for row in done if row["run"] == "default"), None)
    runs, curves = [], []
    for row in done:
        over = row["seconds"] / plain if plain and row["seconds"] else None
        runs.append({"kind": "run", "name": name_of(row), "seconds_over_plain": over} | row)
        curves += [{"kind": "curve", "name": name_of(row)} | point for point in runs[-1].pop("curve")]
    points = [row for row in runs if row["run"] == "grid"]
    best = min((row for row in points if row["val"] is not None), key=lambda row: row["val"], default=None)
    of_all = sum(item["run"] == "grid" for item in todo)
    seconds = sum(row["seconds"] or 0.0 for row in points)
    won = (
        [best | {"kind": "best of grid", "points": len(points), "of": of_all, "grid_seconds": seconds}] if best else []
    )
    return [*won, *runs, *curves]


def main(args: Common, name: str, data: str, build: Build) -> list[Row]:
    """Make the runs that are not there yet and can end in time; write the result after each.

    Args:
        name: of the result, NAME.json, and of the finished runs, NAME.jsonl.
        data: what is trained on, in words: runs on other data are other runs.
        build: `build(args)` → a fresh Training.
    """
    began = time.perf_counter()
    todo, out, left = items(args, name, data), Path(args.out), list[str]()
    path, guess = out / f"{name}.jsonl", math.nan
    for item in todo:
        kept = finished(path)
        done = [row for each in todo if (row := of(each, kept)) is not None]
        if of(item, kept) is not None:
            continue
        if item["run"] == "recipe" and of(item | {"run": "tuned"}, done) is None:
            left.append(name_of(item))
            continue
        if math.isnan(guess):
            guess = probe(build, args)
        over = time.perf_counter() - began + seconds_needed(item, done, guess) > 60 * args.minutes
        if args.minutes and over:
            left.append(name_of(item))
            continue
        sweep(partial(run, build, args, done), [item], path)
        rows = result_rows(todo, finished(path))
        results.write(out / f"{name}.json", command(args), rows, args.device, one_line_a_row=True)
        show(next(row for row in rows if row["kind"] == "run" and row["name"] == name_of(item)))
    rows = result_rows(todo, finished(path))
    if left:
        print(
            f"{len(left)} of {len(todo)} runs were not begun, as there was no time: {'; '.join(left)}. Call it again."
        )
    if rows:
        results.write(out / f"{name}.json", command(args), rows, args.device, one_line_a_row=True)
        print(f"{out / f'{name}.json'}; curves: tensorboard --logdir {out / 'tensorboard'}")
    return rows


def show(row: Row) -> None:
    numbers = " ".join(f"{'–' if row[x] is None else f'{row[x]:.4g}':>9s}" for x in SHOWN)
    print(f"{row['name']:<36s} {numbers}   ({', '.join(SHOWN)})", flush=True)


SHOWN = ("val", "test", "accuracy", "seconds", "seconds_over_plain", "end_lr")


def check(args: Common) -> None:
    """Leave where arguments do not fit, before anything is read."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; pass --device cpu")
    if args.dtype not in ("bf16", "fp32"):
        raise SystemExit(f"--dtype: bf16 or fp32, got {args.dtype}")
    if min(args.steps, args.batch, args.points) < 1 or args.points > args.steps:
        raise SystemExit("--steps, --batch and --points are at least 1, --points at most --steps")
    if args.minutes < 0 or not args.costs:
        raise SystemExit("--minutes is at least 0, and --costs has one at least")


def autocast(args: Common) -> Any:
    """The context of a forward pass in the arithmetic that was asked for."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bf16")


def evaluator(
    model: nn.Module, chunks: Callable[[str], Iterator[Batch]], losses: Callable[[Tensor, Tensor], Tensor], args: Common
) -> Callable[[str], tuple[float, float]]:
    """`evaluate` of a Training: mean loss and accuracy over a set's chunks. losses: outputs, targets → their sum."""

    @torch.no_grad()
    def evaluate(split: str) -> tuple[float, float]:
        training, total, right, count = model.training, 0.0, 0, 0
        model.eval()
        sums = []
        for x, y in chunks(split):
            with autocast(args):
                outputs = model(x)
                sums.append(torch.stack([losses(outputs, y).double(), (outputs.argmax(-1) == y).sum().double()]))
            count += y.numel()
        model.train(training)
        total, right = torch.stack(sums).sum(0).tolist()
        return total / count, right / count

    return evaluate
