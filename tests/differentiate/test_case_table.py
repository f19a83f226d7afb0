"""The case table: hypergradients of every optimizer and problem against finite differences of the stock loop."""

from __future__ import annotations

import pytest

from tests.cases import EVERY_PROBLEM_WITH, MODES, OPTIMIZERS, RESUMED_WITH, Case, case_of
from tests.oracle import assert_matches, assert_same, hypergradient
from tests.tiers import slow_but

EVERY_OPTIMIZER = [*map(case_of, OPTIMIZERS), Case("matrices_live", "muon")]
EVERY_PROBLEM = [
    Case(problem, optimizer)
    for problem in ("quadratic", "ridge", "mlp_live", "cnn_batchnorm", "embedding", "dropout", "tied_frozen")
    for optimizer in EVERY_PROBLEM_WITH
] + [Case(problem, optimizer) for problem in ("mlp_live", "embedding", "tied_frozen") for optimizer in RESUMED_WITH]
# thresholds that some of the six steps exceed, and some do not
CLIPPED = [Case("mlp", optimizer, clip_norm=0.245) for optimizer in (*EVERY_PROBLEM_WITH, "sgd")] + [
    Case("mlp", optimizer, clip_value=0.05) for optimizer in (*EVERY_PROBLEM_WITH, "sgd")
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", EVERY_OPTIMIZER, ids=str)
def test_every_optimizer_in_every_mode(case: Case, mode: str) -> None:
    assert_matches(hypergradient(case, **MODES[mode]), case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "graphs kept"])
@pytest.mark.parametrize("case", EVERY_PROBLEM + CLIPPED, ids=str)
def test_every_problem_and_clipping(case: Case, mode: str) -> None:
    assert_matches(hypergradient(case, **MODES[mode]), case)


FEW = [case for case in EVERY_PROBLEM + CLIPPED if case.optimizer in ("adamw", "nadam")]


@pytest.mark.parametrize("case", [*EVERY_OPTIMIZER, *slow_but(EVERY_PROBLEM + CLIPPED, *FEW)], ids=str)
def test_mode_against_mode(case: Case) -> None:
    forward = hypergradient(case, mode="forward")
    for mode in ("graphs kept", "every second step", "one checkpoint"):
        assert_same(hypergradient(case, **MODES[mode]), forward)
