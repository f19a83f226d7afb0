import pytest

from experiments import figures

CURVES = [
    {"method": method, "step": step, "val_loss": loss, "lr": 0.1, "weight_decay": 1e-3}
    for method in ("tuned by hypergrad", "untuned")
    for step, loss in ((0, 2.3), (10, None))
]
STARTS = [
    {"method": method, "steps": 100, "start_lr": 1e-3, "test_loss": loss, "diverged": loss is None}
    for method in ("tuned", "untuned", "grid", "winner")
    for loss in (0.35, 0.5, None)
]
PATHS = [
    {"method": method, "seed": seed, "step": step, "lr": 10.0 ** -(seed + 1), "weight_decay": 1e-3, "momentum": 0.9}
    for method in ("tuned", "tuned_momentum")
    for seed in (1, 2, 3)
    for step in (0, 1, 10, 100)
]


@pytest.mark.parametrize(("make", "rows"), [(figures.quickstart, CURVES), (figures.fashion_mnist, STARTS)])
def test_a_figure_is_drawn_with_diverged_runs_among_its_rows(make, rows, tmp_path):
    figure = make(rows)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    shown = [text.get_text() for legend in (figure.legends or [figure.axes[0].get_legend()]) for text in legend.texts]
    assert "tuned by hypergrad" in shown


def test_the_grids_winner_is_a_line_at_the_mean_of_its_seeds():
    panel = figures.fashion_mnist(STARTS).axes[0]
    (line,) = panel.lines
    assert set(line.get_ydata()) == {0.425}
    assert line.get_label() == "best of a grid of 3, mean of 2 seeds"


def test_trajectories_are_a_line_a_tuned_start_of_lr_over_one_minus_momentum(tmp_path):
    figure = figures.trajectories(PATHS)
    lr, decay = figure.axes[:2]
    assert len(lr.lines) == len(decay.lines) == 3
    assert [line.get_ydata()[0] for line in lr.lines] == pytest.approx([0.1, 0.01, 0.001])
    assert len({line.get_color() for line in lr.lines}) == 3
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
