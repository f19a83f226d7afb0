"""DistributedDataParallel on two processes: as one process on all rows; ranks equal bit for bit; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import ddp_bytes
from tests.online import rank_jobs
from tests.online.union_loops import UnionLoop, Unused, adamw, linear, mlp, norm, run
from tests.ranks import Ranks, started
from tests.tiers import slow_but

UNION = 1e-9  # rounding of 200 steps: sums over ranks are taken in another order than over rows
FD_RTOL = 1e-6  # central differences in float64, Richardson-extrapolated


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started(tmp_path_factory.mktemp("ranks")) as found:
        yield found


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    """Equal bit for bit, all but buffers, which are each rank's own; with a tolerance relative to the largest element."""
    assert one.keys() == other.keys()
    for name, x in one.items():
        if name == "buffers":
            continue
        if isinstance(x, Tensor):
            assert torch.isfinite(x).all(), name
            off = float((x - other[name]).abs().max())
            assert off <= tolerance * float(x.abs().max()), (name, off)
        elif isinstance(x, float):
            assert abs(x - other[name]) <= tolerance * abs(x), name
        else:
            assert x == other[name], name


def cosine(opt: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=400)


VIEWS = {"gradient_as_bucket_view": True}
SPARSE = {"find_unused_parameters": True}
LOOPS = {
    "wrapper": UnionLoop(),
    "inner module, whole validation data": UnionLoop(inner=True, sharded=False),
    "warm start, a known length": UnionLoop(
        optimizer=adamw, tuner={"warm_start": True, "total_steps": 200, "tune": ("lr", "weight_decay", "betas")}
    ),
    "accumulated and clipped": UnionLoop(accumulate=3, clip_norm=0.5),
    "accumulated, buckets": UnionLoop(accumulate=2, inner=True, ddp=VIEWS),
    "scheduler": UnionLoop(scheduler=cosine),
    "a plan, products in one step of three": UnionLoop(
        optimizer=adamw,
        tuner={
            "plan": {"cost": 3.0, "product": 2.0, "validation": 1.0, "every": 5, "resting": 5, "stride": 3},
            "total_steps": 200,
        },
    ),
    "resumed": UnionLoop(optimizer=adamw, resume=103, clip_norm=0.5),
    "scaled": UnionLoop(scaler=True, clip_norm=1.0),
    "unequal shards": UnionLoop(shares=(5, 3), accumulate=2),
    "unused parameters": UnionLoop(net=Unused, ddp=SPARSE | VIEWS),
    "zeros for gradients, momentum": UnionLoop(optimizer=rank_jobs.nesterov, tuner={"tune": ("lr", "momentum")}),
}


def assert_union(ranks: Ranks, loop: UnionLoop) -> None:
    one, other = ranks(run, loop)
    assert_same(one, other)
    alone = run(loop, alone=True)
    assert alone["stats"]["hyper_steps"] >= 0.17 * loop.steps
    assert_same(alone, one, UNION)


def test_ranks_train_for_a_few_steps_as_one_process_on_all_rows(ranks: Ranks) -> None:
    assert_union(ranks, UnionLoop(steps=30, accumulate=2, clip_norm=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_ranks_train_as_one_process_on_all_rows(ranks: Ranks, name: str) -> None:
    assert_union(ranks, LOOPS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "dtype"),
    [
        (UnionLoop(net=norm), torch.float64),
        (UnionLoop(net=norm, optimizer=adamw, accumulate=2, tuner={"warm_start": True}), torch.float32),
        (UnionLoop(net=mlp, autocast=True, tuner={"warm_start": True}), torch.float32),
        (UnionLoop(net=norm, inner=True, ddp=VIEWS), torch.bfloat16),
    ],
    ids=["BatchNorm, dropout", "float32", "autocast", "bfloat16"],
)
def test_ranks_are_equal_bit_for_bit(ranks: Ranks, loop: UnionLoop, dtype: torch.dtype) -> None:
    one, other = ranks(run, loop, False, True, dtype)
    assert one["stats"]["hyper_steps"] >= 35
    assert_same(one, other)


@pytest.mark.parametrize(
    "loop",
    [
        pytest.param(UnionLoop(net=norm, steps=10), marks=pytest.mark.slow),
        pytest.param(UnionLoop(net=norm, steps=10, accumulate=2, clip_norm=0.5, inner=True), marks=pytest.mark.slow),
        UnionLoop(steps=10, shares=(6, 2), optimizer=adamw),
        pytest.param(UnionLoop(net=Unused, steps=10, ddp=SPARSE), marks=pytest.mark.slow),
    ],
    ids=["BatchNorm, dropout", "accumulated and clipped", "unequal shards", "unused parameters"],
)
def test_hypergradients_are_finite_differences_of_the_stock_loop_on_the_ranks(ranks: Ranks, loop: UnionLoop) -> None:
    loop = replace(loop, tuner={"every": loop.steps, "average": False}, own_draws=True)
    one, other = ranks(rank_jobs.beside_differences, loop)
    assert one == other
    for name, (found, difference) in one.items():
        assert found == pytest.approx(difference, rel=FD_RTOL), name


@pytest.mark.slow
def test_training_is_that_of_the_stock_loop_bit_for_bit_where_nothing_moves(ranks: Ranks) -> None:
    loop = UnionLoop(net=norm, steps=20, accumulate=2, clip_norm=0.5, ddp=VIEWS)
    frozen = ranks(run, replace(loop, frozen=True))
    for stock, one in zip(ranks(run, loop, False, False), frozen, strict=True):
        assert torch.equal(stock["weights"], one["weights"])
        assert torch.equal(stock["buffers"], one["buffers"])


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.slow
def test_every_rank_passes_over_the_step_that_is_nan_on_one(ranks: Ranks, scaler: bool) -> None:
    loop = UnionLoop(steps=30, nan=(range(11, 12), 1), ddp=VIEWS, scaler=scaler)
    one, other = ranks(run, loop)
    assert one["stats"]["steps"] == 30 - scaler  # the scaler leaves it out by itself
    assert one["stats"]["nonfinite_steps"] == 1 - scaler
    assert_same(one, other)
    assert_same(run(loop, alone=True), one, UNION)


TROUBLE = {
    "three bad batches in a row": (UnionLoop(steps=60, nan=(range(31, 34), 1)), "rollbacks"),
    "lr far too large": (UnionLoop(steps=60, optimizer=rank_jobs.hot), "rollbacks"),
    "a validation loss that rises": (UnionLoop(net=mlp, steps=200, optimizer=adamw, rising=True), "backtracks"),
    "a known length, a restart": (
        UnionLoop(optimizer=rank_jobs.warm, tuner={"total_steps": 400}, rising=True),
        "backtracks",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLE)
def test_every_rank_goes_back_at_the_same_step(ranks: Ranks, name: str) -> None:
    loop, what = TROUBLE[name]
    one, other = ranks(run, loop)
    assert one["stats"][what] >= 1
    assert_same(one, other)
    assert_same(run(loop, alone=True), one, 1e-6)  # rounding, amplified before lr came down


@pytest.mark.slow
def test_two_models_with_losses_of_their_own(ranks: Ranks) -> None:
    """A GAN: either loss leaves gradients in both models."""
    one, other = ranks(rank_jobs.gan)
    assert_same(one, other)
    assert one["stats"]["changed_gradients"] == one["stats"]["plain_steps"] == 0
    assert_same(rank_jobs.gan(alone=True), one, UNION)


@pytest.mark.slow
def test_whole_runs(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks(rank_jobs.tuned_run, tmp_path)
    assert (tmp_path / "0" / "tune_run.json").exists() and not (tmp_path / "1").exists()
    assert_same(one, other)
    assert_same(rank_jobs.tuned_run(alone=True), one, UNION)


@pytest.mark.slow
def test_a_process_group_of_one(ranks: Ranks) -> None:
    """Each rank trains in DistributedDataParallel over itself alone."""
    one, other = ranks(rank_jobs.group_of_one)
    assert not torch.equal(one["weights"], other["weights"])
    for rank, found in enumerate((one, other)):
        assert torch.equal(found["weights"], rank_jobs.apart(rank)["weights"])


def test_one_collective_for_products_and_one_for_numbers_a_step(ranks: Ranks) -> None:
    """Beside those of DistributedDataParallel, which are not made in Python; one more for numbers at a hyperparameter step."""
    for counts in ranks(rank_jobs.collectives, UnionLoop(steps=30, accumulate=3)):
        assert counts[0] == 1  # no tangent yet, so no product
        assert all(n == (3 if t % 5 == 4 else 2) for t, n in enumerate(counts) if t > 20)


@pytest.mark.parametrize(("norm", "both"), slow_but([*product((False, True), repeat=2)], (True, True)))
def test_bytes_of_each_kind_of_step(ranks: Ranks, norm: bool, both: bool) -> None:
    """4 n of DistributedDataParallel for n weights, as without a tuner, 4 k n for k products where they are due, few numbers."""
    width = 64
    one, other = ranks(ddp_bytes.measure, width, norm, both)
    assert one == other
    plain, other = ranks(ddp_bytes.measure, width, norm, both, False)
    assert plain == other and [row["kind"] for row in plain] == ["plain"]
    n = 20 * width + width + width * 10 + 10 + 2 * width * norm
    buffers = norm * (4 * 2 * width + 8)  # running mean and variance, and the number of batches
    k, rows = 1 + both, {row["kind"]: row for row in one}
    assert set(rows) == {"resting", "product", "reading", "product and reading"}
    for kind, row in {**rows, "plain": plain[0]}.items():
        product, reading = "product" in kind, "reading" in kind
        assert (row["weights"], row["gradient_bytes"]) == (n, 4 * n)
        assert row["buffer_bytes"] == buffers * (1 + reading)  # val_loss is a forward pass too
        assert (row["vectors"], row["vector_bytes"]) == (product, product * 4 * k * n)
        assert row["scalar_calls"] == (0 if kind == "plain" else 1 + reading)
        assert row["scalar_bytes"] <= 1000


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.slow
def test_whole_steps(ranks: Ranks, mode: str, inner: bool) -> None:
    one, other = ranks(rank_jobs.whole_steps, mode, inner)
    assert_same(one, other)
    assert one["stats"]["hyper_steps"] >= 4
    assert_same(rank_jobs.whole_steps(mode, inner, alone=True), one, UNION)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "forward"},
        {"mode": "unrolled"},
        {"mode": "unrolled", "every": 3},
        {"mode": "implicit", "look_back": 4},
        {"mode": "implicit", "wrt": ("weight_decay", "scale"), "net": linear},
        {"mode": "unrolled", "net": Unused},
    ],
    ids=lambda options: " ".join(getattr(x, "__name__", str(x)) for x in options.values()),
)
@pytest.mark.slow
def test_hypergradient_is_that_of_one_process_on_all_rows(ranks: Ranks, options: dict[str, Any]) -> None:
    one, other = ranks(rank_jobs.whole_run, options, False)
    assert_same(one, other)
    assert_same(rank_jobs.whole_run(options, False, alone=True), one, UNION)
    assert_same(one, ranks(rank_jobs.whole_run, options, True)[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_hypergradient_through_each_ranks_own_running_statistics(ranks: Ranks, mode: str) -> None:
    one, other = ranks(rank_jobs.running_statistics, mode)
    assert one == other
    assert one[0] == pytest.approx(one[1], rel=FD_RTOL)


def test_models_that_are_not_wrapped_stay_apart(ranks: Ranks) -> None:
    one, other = ranks(rank_jobs.apart)
    assert one["communicated"] == other["communicated"] == 0
    assert not torch.equal(one["weights"], other["weights"])
    assert torch.equal(one["weights"], rank_jobs.apart(0)["weights"])


def test_gradients_that_came_by_loss_backward_too_are_a_change(ranks: Ranks) -> None:
    one, other = ranks(rank_jobs.mixed_with_plain)
    assert one == other
    assert one["changed_gradients"] == one["steps"] == 5


def test_only_the_first_rank_writes(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks(rank_jobs.logged, tmp_path)
    assert (tmp_path / "0" / "metrics.jsonl").exists() and not (tmp_path / "1").exists()
    assert one and not other  # warnings


def test_ranks_draw_validation_batches_of_their_own(ranks: Ranks) -> None:
    one, other = ranks(rank_jobs.draws)
    assert len(one) == len(other) and not set(one) & set(other)


def test_a_state_may_be_asked_for_on_one_rank_alone(ranks: Ranks) -> None:
    one, other = ranks(rank_jobs.state_on_one)
    assert torch.equal(one, other)


REFUSED = {
    "static_graph": "static_graph=True",
    "join": "same number of batches",
    "comm_hook": "communication hook",
    "outside": "does not average",
    "sync_batchnorm": "SyncBatchNorm",
    "late": "make the Tuner after it",
    "inner_forward": "not the mean of the ranks' gradients",
    "always_no_sync": "not the mean of the ranks' gradients",
    "other_values": "must be the same on every rank",
    "zero_redundancy": "ZeroRedundancyOptimizer",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp1_inner": "FullyShardedDataParallel",
    "fsdp2": "DTensors",
    "other_number_of_batches": "must be the same on every rank",
    "check": "one process",
    "compiled": "compile=True",
    "broadcast_statistics": "broadcast_buffers=False",
    "broadcast_statistics_in_windows": "broadcast_buffers=False",
    "other_state": "must be the same on every rank",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.slow
def test_refused_before_weights_change(ranks: Ranks, name: str) -> None:
    for message in ranks.errors(getattr(rank_jobs, f"refused_{name}")):
        assert REFUSED[name] in message.split("Traceback")[0], message
        assert "weights changed" not in message


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"no validation data|[Cc]onnection"):
        torch.multiprocessing.spawn(rank_jobs.dies, (str(tmp_path / "store"),), nprocs=2)
