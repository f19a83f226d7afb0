from dataclasses import dataclass

import pytest

from experiments.arguments import arg, command, parse


@dataclass
class Args:
    """An experiment."""

    steps: int = arg(1000, "steps", quick=10)
    lr: float = arg(0.1, "learning rate")
    methods: tuple = arg(("a", "b"), "methods")
    data_dir: str = arg(None, "folder")
    out: str = arg("runs", "folder", quick="runs/quick")
    quick: bool = arg(False, "short")


def test_every_field_is_an_option_of_its_default_s_type():
    args = parse(Args, ["--steps", "5", "--lr", "1e-3", "--methods", "a", "c", "--data-dir", "d"])
    assert args == Args(steps=5, lr=1e-3, methods=("a", "c"), data_dir="d")


def test_quick_changes_defaults_and_yields_to_what_is_given():
    assert parse(Args, ["--quick"]) == Args(steps=10, out="runs/quick", quick=True)
    assert parse(Args, ["--quick", "--steps", "1000"]).steps == 1000


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--quick"],
        ["--steps", "7"],
        ["--quick", "--steps", "1000"],
        ["--methods", "b"],
        ["--out", "a b", "--quick"],
    ],
)
def test_the_recorded_command_gives_the_same_arguments_again(argv):
    import shlex

    args = parse(Args, argv)
    words = shlex.split(command(args))
    assert words[:2] == ["python", "-m"]
    assert parse(Args, words[3:]) == args


def test_the_recorded_command_names_no_path_of_this_machine():
    assert "/somewhere" not in command(parse(Args, ["--data-dir", "/somewhere", "--steps", "7"]))


def test_a_word_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(Args, ["--steps", "many"])
    assert "--steps" in capsys.readouterr().err
