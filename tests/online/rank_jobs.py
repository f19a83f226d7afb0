"""What test_distributed.py runs on every rank: functions at the top of a module, as processes take them by name."""

from __future__ import annotations

import datetime
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hypergrad
from tests.online.live_loops import slope
from tests.online.union_loops import INPUTS, UnionLoop, Unused, mlp, norm, run, sgd


def nesterov(model: nn.Module) -> torch.optim.Optimizer:
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, nesterov=True)
    opt.zero_grad = lambda: torch.optim.Optimizer.zero_grad(opt, set_to_none=False)  # type: ignore[method-assign]
    return opt


def hot(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)


def warm(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often collectives were called from Python."""
    found, saved = [0], (dist.all_reduce, dist.all_gather_object)

    def counting(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            found[0] += 1
            return f(*args, **kw)

        return call

    dist.all_reduce, dist.all_gather_object = map(counting, saved)
    try:
        yield found
    finally:
        dist.all_reduce, dist.all_gather_object = saved


# ---- live loops


def beside_differences(loop: UnionLoop) -> dict[str, tuple[float, float]]:
    """Every hypergradient, and the finite difference of the loop with DistributedDataParallel and torch alone."""

    def ends_at(name: str, x: float) -> float:
        def moved(model: nn.Module) -> torch.optim.Optimizer:
            opt = loop.optimizer(model)
            opt.param_groups[0][name] += x
            return opt

        value = torch.tensor(run(replace(loop, optimizer=moved), False, False)["ends at"], dtype=torch.float64)
        dist.all_reduce(value)
        return float(value) / dist.get_world_size()

    found = run(loop)
    names = ("lr", "weight_decay")
    return {n: (float(found[f"d/d {n}"]), slope(lambda x, n=n: ends_at(n, x))) for n in names}


def collectives(loop: UnionLoop) -> list[int]:
    """How many in each step."""
    at: list[int] = []
    with counted() as n:

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            opt = loop.optimizer(model)
            zero_grad = opt.zero_grad

            def noting() -> None:
                at.append(n[0])
                zero_grad()

            opt.zero_grad = noting  # type: ignore[method-assign]
            return opt

        run(replace(loop, optimizer=optimizer))
        at.append(n[0])
    return [b - a for a, b in pairwise(at)]


# ---- whole steps and whole runs


def in_float64(f: Callable[..., Any]) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f()
    finally:
        torch.set_default_dtype(torch.float32)


def problem(net: Callable[[], nn.Module], inner: bool, alone: bool, steps: int, **ddp: Any) -> Any:
    """A model, what a tuner is given of it, this rank's batches and its validation batch."""
    torch.manual_seed(4)
    g = torch.Generator().manual_seed(5)
    rows = slice(None) if alone else slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    every = [(torch.randn(8, INPUTS, generator=g), torch.randn(8, 1, generator=g)) for _ in range(steps + 1)]
    *batches, val = [(x[rows], y[rows]) for x, y in every]
    module = net()
    model = module if alone else DistributedDataParallel(module, **ddp)
    return module, model, module if inner else model, batches, val


def whole_steps(mode: str, inner: bool, alone: bool = False) -> dict[str, Any]:
    def train() -> dict[str, Any]:
        module, wrapper, model, batches, val = problem(mlp, inner, alone, 24)
        opt = sgd(module)

        def loss(model: nn.Module, batch: Any, hypers: Any) -> Tensor:
            return mse(model, batch) * hypers["scale"].exp()

        tuner = hypergrad.Tuner(
            model, opt, lambda: mse(model, val), hypers={"scale": hypergrad.Hyperparameter(0.0)}, loss=loss, mode=mode,
            horizon=5, every=5, warm_start=False, clip_norm=1.0,
        )  # fmt: skip
        losses = [tuner.step(batch) for batch in batches]
        mean = torch.stack(losses)
        if not alone:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        found = {f"d/d {name}": x for name, x in tuner.hypergradients.items()} | {"losses": mean, "weights": weights}
        del wrapper
        return found | tuner.values | {"stats": tuner.stats, "val_loss": tuner.val_loss}

    return in_float64(train)


def whole_run(options: dict[str, Any], inner: bool, alone: bool = False) -> dict[str, Any]:
    options = dict(options)
    net = options.pop("net", mlp)

    def differentiate() -> dict[str, Any]:
        ddp = {"find_unused_parameters": net is Unused}
        module, wrapper, model, batches, val = problem(net, inner, alone, 7, **({} if alone else ddp))
        opt = sgd(module)

        def loss(model: nn.Module, batch: Any, hypers: Any) -> Tensor:
            return mse(model, batch) * hypers["scale"]

        given = {"wrt": ("lr", "weight_decay", "scale"), **options}
        weights = [p.detach().clone() for p in module.parameters()]
        r = hypergrad.hypergradient(model, opt, loss, batches, lambda: mse(model, val), hypers={"scale": 1.3}, **given)
        assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
        del wrapper
        initial = {} if r.initial is None else {f"initial {i}": x for i, x in enumerate(r.initial)}
        return r.gradients | initial | {"value": r.value.detach()}

    return in_float64(differentiate)


def running_statistics(mode: str) -> tuple[float, float]:
    """dL/dlr with validation in eval mode, and its finite difference."""

    def build() -> Any:
        module, wrapper, _, batches, val = problem(norm, False, False, 6, broadcast_buffers=False)
        module[3].p = 0.0

        def val_loss() -> Tensor:
            wrapper.eval()
            try:
                return mse(wrapper, val)
            finally:
                wrapper.train()

        return module, wrapper, batches, val_loss

    def stock(x: float) -> float:
        module, wrapper, batches, val_loss = build()
        opt = sgd(module)
        opt.param_groups[0]["lr"] += x
        for batch in batches:
            opt.zero_grad()
            mse(wrapper, batch).backward()
            opt.step()
        value = val_loss().detach()
        dist.all_reduce(value)
        return float(value) / dist.get_world_size()

    def both() -> tuple[float, float]:
        module, wrapper, batches, val_loss = build()
        r = hypergrad.hypergradient(wrapper, sgd(module), mse, batches, val_loss, wrt="lr", mode=mode)
        return float(r.gradients["lr"]), slope(stock)

    return in_float64(both)


def tuned_run(folder: Path | None = None, alone: bool = False) -> dict[str, Any]:
    kept = []  # DistributedDataParallel modules

    def build(seed: int) -> hypergrad.Run:
        module, wrapper, model, batches, val = problem(mlp, False, alone, 8)
        kept.append(wrapper)
        return hypergrad.Run(model, sgd(module), batches, mse, lambda: mse(model, val))

    def tune() -> dict[str, Any]:
        log_dir = None if folder is None else folder / str(dist.get_rank())
        found = hypergrad.tune_run(
            build, {"lr": hypergrad.Hyperparameter(), "weight_decay": hypergrad.Hyperparameter()}, outer_steps=5,
            horizons=(1.0,), progress=False, log_dir=log_dir,
        )  # fmt: skip
        return {name: torch.as_tensor(x) for name, x in found.values.items()} | {"value": found.value}

    return in_float64(tune)


def gan(alone: bool = False) -> dict[str, Any]:
    def train() -> dict[str, Any]:
        torch.manual_seed(6)
        inner = [nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, n)) for n in (2, 1)]
        g, d = inner if alone else [DistributedDataParallel(m) for m in inner]
        opts = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.5) for m in inner]
        draws = torch.Generator().manual_seed(7)
        rows = slice(None) if alone else slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        x = torch.randn(8, 2, generator=draws)[rows]
        both = nn.ModuleList([g, d])
        tuner = hypergrad.Tuner(
            both, opts, lambda: (d(g(x)) - 1).square().mean(), tune="lr", every=5, warm_start=False, average=False
        )
        for _ in range(30):
            noise, real = (torch.randn(8, 2, generator=draws)[rows] for _ in range(2))
            opts[0].zero_grad()
            tuner.backward((d(g(noise)) - 1).square().mean())
            opts[0].step()
            opts[1].zero_grad()
            tuner.backward((d(real) - 1).square().mean() + d(g(noise).detach()).square().mean())
            opts[1].step()
        weights = torch.cat([flat(m) for m in inner])
        return tuner.values | {"weights": weights, "d": tuner.hypergradients["lr"], "stats": tuner.stats}

    return in_float64(train)


# ---- a process group without DistributedDataParallel, logs, draws, states


def simple_loop(
    model: nn.Module, steps: int = 12, seed: int = 0, **options: Any
) -> tuple[hypergrad.Tuner, torch.optim.Optimizer]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, INPUTS, generator=g), torch.randn(16, 1, generator=g)
    opt = sgd(model)
    options = {"warm_start": False, "every": 4, **options}
    val_loss = options.pop("val_loss", lambda: mse(model, (x[8:], y[8:])))
    tuner = hypergrad.Tuner(model, opt, val_loss, **options)
    for _ in range(steps):
        opt.zero_grad()
        tuner.backward(mse(model, (x[:8], y[:8])))
        opt.step()
    return tuner, opt


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(rank: int | None = None) -> dict[str, Any]:
    rank = dist.get_rank() if rank is None else rank
    torch.manual_seed(rank)
    model = mlp()
    with counted() as n:
        simple_loop(model, seed=rank)
    return {"weights": flat(model), "communicated": n[0]}


def mixed_with_plain() -> dict[str, int]:
    """Every step has gradients of loss.backward() and of tuner.backward."""
    model = DistributedDataParallel(mlp())
    opt = sgd(model)
    x = torch.randn(4, INPUTS) + dist.get_rank()
    tuner = hypergrad.Tuner(model, opt, lambda: model(x).square().mean(), warm_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            opt.zero_grad()
            model(x).square().mean().backward()
            tuner.backward(model(x).square().mean())
            opt.step()
    return tuner.stats


def group_of_one() -> dict[str, Any]:
    groups = [dist.new_group([i]) for i in range(dist.get_world_size())]
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = mlp()
    wrapper = DistributedDataParallel(model, process_group=groups[rank])
    simple_loop(wrapper, seed=rank)
    return {"weights": flat(model)}


def logged(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuner, _ = simple_loop(DistributedDataParallel(mlp()), total_steps=8, log_dir=folder / str(dist.get_rank()))
        tuner.close()
    return [str(x.message) for x in caught if "total_steps" in str(x.message)]


def draws() -> list[float]:
    seen: list[float] = []
    model = DistributedDataParallel(mlp())

    def val_loss() -> Tensor:
        x = torch.randn(8, INPUTS)
        seen.append(float(x.sum()))
        return mse(model, (x, torch.zeros(8, 1)))

    simple_loop(model, val_loss=val_loss)
    return seen[1:]  # the first is taken before training, from the loop's own stream


def state_on_one() -> Tensor:
    model = DistributedDataParallel(mlp())
    tuner, opt = simple_loop(model)
    if dist.get_rank() == 0:
        tuner.state_dict()
    x, y = torch.ones(4, INPUTS) * dist.get_rank(), torch.ones(4, 1)
    for _ in range(9):
        opt.zero_grad()
        tuner.backward(mse(model, (x, y)))
        opt.step()
    return flat(model)


# ---- what is refused


def refused(model: nn.Module, f: Callable[[], Any]) -> None:
    weights = flat(model)
    try:
        f()
    except Exception as error:
        if not torch.equal(weights, flat(model)):
            raise AssertionError("weights changed") from error
        raise
    finally:
        gc.collect()  # a DistributedDataParallel module that is gone sees no more gradients


def refused_static_graph() -> None:
    model = DistributedDataParallel(mlp(), static_graph=True)
    refused(model, lambda: simple_loop(model))


def refused_join() -> None:
    model = DistributedDataParallel(mlp())

    def loop() -> None:
        with model.join(throw_on_early_termination=False):
            simple_loop(model, steps=1)

    refused(model, loop)


def refused_comm_hook() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = DistributedDataParallel(mlp())
    model.register_comm_hook(None, fp16_compress_hook)
    refused(model, lambda: simple_loop(model))


def refused_outside() -> None:
    wrapped, head = DistributedDataParallel(nn.Linear(INPUTS, 3)), nn.Linear(3, 1)
    model = nn.Sequential(wrapped, head)
    refused(model, lambda: simple_loop(model))


def refused_sync_batchnorm() -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(INPUTS, 3), nn.SyncBatchNorm(3), nn.Linear(3, 1)))
    refused(model, lambda: hypergrad.Tuner(model, sgd(model), lambda: torch.zeros(1)))


def refused_late() -> None:
    module = mlp()
    opt = sgd(module)
    x = torch.randn(4, INPUTS)
    tuner = hypergrad.Tuner(module, opt, lambda: module(x).square().mean())
    model = DistributedDataParallel(module)
    refused(model, lambda: tuner.backward(model(x).square().mean()))


def refused_inner_forward() -> None:
    model = DistributedDataParallel(mlp())
    x = torch.randn(4, INPUTS) + dist.get_rank()
    tuner = hypergrad.Tuner(model, opt := sgd(model), lambda: model(x).square().mean())

    def step() -> None:
        tuner.backward(model.module(x).square().mean())
        opt.step()

    refused(model, step)


def refused_always_no_sync() -> None:
    model = DistributedDataParallel(mlp())
    x = torch.randn(4, INPUTS) + dist.get_rank()
    tuner = hypergrad.Tuner(model, opt := sgd(model), lambda: model(x).square().mean())

    def step() -> None:
        with model.no_sync():
            tuner.backward(model(x).square().mean())
        opt.step()

    refused(model, step)


def refused_other_values() -> None:
    model = DistributedDataParallel(mlp())
    opt = torch.optim.SGD(model.parameters(), lr=0.1 + dist.get_rank())
    refused(model, lambda: hypergrad.Tuner(model, opt, lambda: model(torch.ones(1, INPUTS)).sum(), tune="lr"))


def refused_zero_redundancy() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(mlp())
    opt = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    refused(model, lambda: hypergrad.Tuner(model, opt, lambda: model(torch.ones(1, INPUTS)).sum(), tune="lr"))


def refused_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    hypergrad.Tuner(model, sgd(model), lambda: model(torch.ones(1, INPUTS)).sum())


def refused_fsdp1_inner() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    module = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    hypergrad.Tuner(module, opt, lambda: module(torch.ones(1, INPUTS)).sum())


def refused_fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    hypergrad.Tuner(model, sgd(model), lambda: model(torch.ones(1, INPUTS)).sum())


def refused_other_number_of_batches() -> None:
    _, wrapper, model, batches, val = problem(mlp, False, False, 3)
    batches = batches[dist.get_rank() :]
    refused(wrapper, lambda: hypergrad.hypergradient(model, sgd(model), mse, batches, lambda: mse(model, val)))


def refused_check() -> None:
    _, wrapper, model, batches, val = problem(mlp, False, False, 3)
    refused(wrapper, lambda: hypergrad.check(model, sgd(model), mse, batches, lambda: mse(model, val)))


def refused_compiled() -> None:
    _, wrapper, model, batches, val = problem(mlp, False, False, 3)
    refused(
        wrapper, lambda: hypergrad.hypergradient(model, sgd(model), mse, batches, lambda: mse(model, val), compile=True)
    )


def refused_other_state() -> None:
    model = DistributedDataParallel(mlp())
    tuner, _ = simple_loop(model)
    state = tuner.state_dict()
    state["loop"]["t"] += dist.get_rank()
    refused(model, lambda: tuner.load_state_dict(state))


def refused_broadcast_statistics(windows: bool = False) -> None:
    module, wrapper, model, batches, val = problem(norm, False, False, 3)
    module[3].p = 0.0

    def val_loss() -> Tensor:
        model.eval()
        try:
            return mse(model, val)
        finally:
            model.train()

    if windows:
        refused(wrapper, lambda: hypergrad.Tuner(model, sgd(model), val_loss, loss=mse, mode="unrolled"))
    refused(wrapper, lambda: hypergrad.hypergradient(model, sgd(model), mse, batches, val_loss))


def refused_broadcast_statistics_in_windows() -> None:
    refused_broadcast_statistics(windows=True)


# ---- a rank that dies


def dies(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    model, calls = DistributedDataParallel(mlp()), [0]
    x = torch.randn(4, INPUTS)

    def val_loss() -> Tensor:
        calls[0] += 1
        if calls[0] == 3 and rank == 1:
            raise FileNotFoundError("no validation data")
        return model(x).square().mean()

    simple_loop(model, steps=100, val_loss=val_loss)
