"""Which processes train a model together: DistributedDataParallel is recognised, other ways are refused by name."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hypergrad.core.processes import ALONE, Processes

_WAY_OUT = "train with torch.nn.parallel.DistributedDataParallel, which keeps every parameter whole on every rank"


def processes_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Processes:
    """The processes that train the optimizers' parameters together.

    They are those of the DistributedDataParallel modules that average the parameters' gradients, whether `model` is such a module
    or one inside it. Without one there is one process, also in a process group: trials that run beside each other stay apart.

    Raises:
        NotImplementedError: other ways of training in parallel, and options of DistributedDataParallel, that cannot be
            differentiated.
    """
    params = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    _refuse_shards(model, params)
    for opt in optimizers:
        if type(opt).__module__.startswith("torch.distributed"):
            raise NotImplementedError(
                f"{type(opt).__name__} keeps other state on every rank: use the optimizer that it wraps, with all parameters on "
                "every rank."
            )
    if not _in_a_group():
        return ALONE
    wrappers = _wrappers(model, params)
    if not wrappers:
        return ALONE
    _check_covered(model, params, wrappers)
    group = wrappers[0].process_group
    if any(x.process_group is not group for x in wrappers):
        raise NotImplementedError("the model's DistributedDataParallel modules have different process groups: use one.")
    found = Processes(group, wrappers)
    if not found.alone and any(isinstance(m, nn.SyncBatchNorm) for x in wrappers for m in x.modules()):
        raise NotImplementedError(
            "nn.SyncBatchNorm has no second derivative: its backward pass communicates. Use nn.BatchNorm of each rank's own "
            "batch, or nn.GroupNorm."
        )
    check_now(found)
    return found


def check_now(processes: Processes) -> None:
    """Raise where a DistributedDataParallel module does what the means over ranks do not follow. Costs nothing."""
    for x in processes.wrappers:
        _check_made(x)
        if x._join_config.enable:
            raise NotImplementedError(
                "DistributedDataParallel.join() repeats the gradients' communication on ranks that have run out of batches, and "
                "not that of tangents: give every rank the same number of batches (DistributedSampler pads or drops)."
            )
        for _, hook in ((state, hook) for hook, state in x._comm_hooks):
            if getattr(hook, "__name__", "") != "allreduce_hook":
                raise NotImplementedError(
                    f"the communication hook {getattr(hook, '__qualname__', hook)} of DistributedDataParallel changes gradients "
                    "in a way that is not differentiated: leave register_comm_hook out."
                )


def check_in_time(processes: Processes, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise where the model came into DistributedDataParallel after `processes` were asked for."""
    if processes is ALONE and not processes_of(model, optimizers).alone:
        raise RuntimeError(
            "the model was put into DistributedDataParallel after the tuner was made, which would tune on each rank apart: "
            "make the Tuner after it."
        )


def _in_a_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _refuse_shards(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Raise where a rank holds a part of the parameters."""
    names = {cls.__name__ for x in (*params, *model.parameters()) for cls in type(x).__mro__}
    if "DTensor" in names:
        raise NotImplementedError(
            f"parameters are DTensors, of fully_shard (FSDP2) or tensor parallelism: every rank holds a part of them. {_WAY_OUT}."
        )
    holders = [*model.modules(), *(_live("FullyShardedDataParallel") if _in_a_group() else ())]
    if "FlatParameter" in names or any(
        type(x).__name__ == "FullyShardedDataParallel" and _holds(x, model) for x in holders
    ):
        raise NotImplementedError(
            f"the model is in FullyShardedDataParallel: every rank holds a part of each parameter. {_WAY_OUT}."
        )


def _live(name: str) -> list[Any]:
    """The live modules of a class; without imports, and without asking objects what they say they are."""
    return [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and type(x).__name__ == name]


def _holds(x: nn.Module, model: nn.Module) -> bool:
    inside = {id(m) for m in x.modules()}
    return any(id(m) in inside for m in model.modules())


# There is no register of them: torch's own (`_get_active_ddp_module`) is set within a forward pass alone.
def _wrappers(model: nn.Module, params: Sequence[Tensor]) -> list[Any]:
    """The live DistributedDataParallel modules that hold a parameter of the optimizers, those of `model` first."""
    mine = {id(p) for p in params}
    found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    found += [
        x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)
    ]  # the model may be inside one
    each = {id(x): x for x in found if hasattr(x, "_module_parameters")}.values()
    return [x for x in each if any(id(p) in mine for p in x._module_parameters)]


def _check_made(x: Any) -> None:
    option = None
    if x.static_graph:
        option = "static_graph=True", "leave it out; with unused parameters use find_unused_parameters=True"
    elif x.mixed_precision is not None:
        option = "mixed_precision", "use torch.autocast"
    elif x._delay_all_reduce_params:
        option = "delay_all_reduce_named_params", "leave it out"
    if option is not None:
        raise NotImplementedError(
            f"DistributedDataParallel({option[0]}) acts inside the backward pass, which is differentiated here: {option[1]}."
        )


def _check_covered(model: nn.Module, params: Sequence[Tensor], wrappers: Sequence[Any]) -> None:
    averaged = {id(p) for x in wrappers for p in x._module_parameters}
    names = {id(p): name for name, p in model.named_parameters()}
    outside = [names.get(id(p), "a parameter") for p in params if p.requires_grad and id(p) not in averaged]
    if outside:
        raise NotImplementedError(
            f"the optimizer trains {outside[0]}, whose gradient DistributedDataParallel does not average: it would differ from "
            "rank to rank. Wrap the module that it belongs to."
        )
