"""Every row of the loops: hypergradients against finite differences of the user's own loop, and its weights bit for bit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts import loops
from tests.online.live_loops import float64
from tests.online.loop_rows import (
    AS_PLAIN,
    REFUSED,
    SAID,
    SUPPORTED,
    UNSEEN,
    check_bit_identical,
    check_hypergradients,
    check_refused,
    check_said,
)
from tests.online.loop_table import ELSEWHERE, LOOPS, SECTIONS
from tests.online.loops_fields import ctc

__all__ = ["float64"]  # the fixture
TESTS = Path(__file__).parent.parent
CHECKS = {
    SUPPORTED: (check_hypergradients, check_bit_identical),
    AS_PLAIN: (check_bit_identical,),
    SAID: (check_said,),
    REFUSED: (check_refused,),
    UNSEEN: (check_hypergradients, check_bit_identical),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if r.slow else n for n, r in LOOPS.items()])
def test_loop(name: str) -> None:
    row = LOOPS[name]
    for check in CHECKS[row.status]:
        check(row)


def test_the_page_is_as_the_rows_are() -> None:
    text = loops.PAGE.read_text(encoding="utf-8")
    assert loops.filled(text) == text, "run: python scripts/loops.py"
    assert all(f"\n| {name} |" in text for name in LOOPS)


def test_no_loop_is_listed_twice() -> None:
    names = [name for rows in SECTIONS.values() for name in rows] + [row.loop for row in ELSEWHERE]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("named", sorted({row.test for row in ELSEWHERE}))
def test_a_test_that_the_page_names_is_there(named: str) -> None:
    file, function = named.split("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {row.status for row in ELSEWHERE} <= set(CHECKS)


def test_ctc_is_that_of_torch() -> None:
    out = torch.randn(9, 4, 5).log_softmax(2)
    targets, lengths = torch.tensor([[1, 1, 2], [3, 2, 4], [2, 2, 2], [4, 1, 1]]), torch.tensor([3, 2, 3, 1])
    in_lengths = torch.tensor([9, 7, 8, 9])
    want = nn.CTCLoss()(out, targets, in_lengths, lengths)
    assert float(ctc(out, targets, in_lengths, lengths)) == pytest.approx(float(want), rel=1e-12)
