import math

import pytest
import torch

from experiments.arguments import parse
from experiments.pools import REFERENCE, SMALL_GRID, Args
from experiments.workloads import COMPARED, FAMILIES, WORKLOADS, chosen, small
from experiments.workloads.small import SMALL


def test_families_are_apart():
    assert (FAMILIES["main"], FAMILIES["small"]) == (COMPARED, tuple(row.name for row in SMALL))
    assert not set(COMPARED) & set(FAMILIES["small"])
    for family, names in FAMILIES.items():
        assert {WORKLOADS[name].family for name in names} == {family}
    assert {row.optimizer for row in SMALL} == set(SMALL_GRID) <= set(REFERENCE)


def test_workloads_win_over_the_family():
    assert chosen(parse(Args, [])) == ("main", COMPARED)
    assert chosen(parse(Args, ["--family", "small"])) == ("small", FAMILIES["small"])
    assert chosen(parse(Args, ["--quick"])) == ("main", ("mlp_digits", "diabetes"))
    assert chosen(parse(Args, ["--workloads", "random_labels"])) == ("small", ("random_labels",))
    assert chosen(parse(Args, ["--family", "small", "--workloads", "muon_mnist1d"])) == ("main", ("muon_mnist1d",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--family", "large"), "--family: unknown large; choose from main, small"),
        (("--workloads", "nothing"), "--workloads: unknown nothing; choose from .*random_labels"),
        (("--workloads", "diabetes", "diabetes_100"), "of one family a call, got main and small"),
    ],
)
def test_what_is_unknown_is_said_with_what_there_is(words, message):
    with pytest.raises(SystemExit, match=message):
        chosen(parse(Args, list(words)))


@pytest.mark.parametrize(("n", "sizes"), [(100, (100, 100, 1597)), (200, (200, 200, 1397)), (1000, (1000, 397, 400))])
def test_two_labels_in_five_are_wrong_but_the_test_split_is_clean(n, sizes):
    data = small.noisy_digits(n, False)
    assert tuple(len(split.y) for split in data) == sizes
    true = small._all_digits().y.split(sizes)
    wrong = [(split.y != y).sum().item() for split, y in zip(data, true)]
    assert wrong == [round(0.4 * sizes[0]), round(0.4 * sizes[1]), 0]


def test_random_labels_are_of_three_classes_alike():
    for split in small.random_labels(False):
        assert max(split.y.bincount()) - min(split.y.bincount()) == 1
    model = torch.nn.Linear(10, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    task = WORKLOADS["random_labels"].build(0)
    task.model = model
    assert task.evaluate("val") == pytest.approx(math.log(3), rel=1e-6)


def test_clean_digits_are_standardised_by_training_rows():
    data = small.clean_digits(False)
    std, mean = torch.std_mean(data.train.x, dim=0)
    assert mean.abs().max() < 1e-5
    assert all(abs(x - 1) < 1e-4 or x == 0 for x in std.tolist()) and (std == 0).any()
    assert all(x.isfinite().all() for x, _ in data)


def test_fine_tuning_starts_at_one_trained_net_with_a_fresh_output_layer():
    small._pretrained.cache_clear()
    before = torch.get_rng_state()
    first, second = (WORKLOADS["fine_tuned_digits"].build(seed).model for seed in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    small._pretrained.cache_clear()
    again = WORKLOADS["fine_tuned_digits"].build(0).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters())]
    assert same == [True, True, True, True, False, False]
    assert all(p.grad is None for p in first.parameters())
    x, y = small._old_digits(old=True)
    trained = small._pretrained(64)
    assert (trained(x).argmax(1) == y).float().mean() > 0.98


def test_the_new_classes_are_numbered_from_0():
    for split in small.new_digits(False):
        assert set(split.y.tolist()) == {0, 1, 2, 3, 4}


def test_gpt_s_text_is_20_kb():
    data = WORKLOADS["gpt_20kb"].build(0).data
    pieces = len(data.val.x) // 10 + len(data.test.x) // 10 + len(data.train.x) // 73
    assert pieces == 20_000 // 321
