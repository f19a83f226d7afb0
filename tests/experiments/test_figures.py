import pytest

from experiments import figures

CURVES = [
    {"method": method, "step": step, "val_loss": loss, "lr": 0.1, "weight_decay": 1e-3}
    for method in ("tuned by hypergrad", "untuned")
    for step, loss in ((0, 2.3), (10, None))
]
STARTS = [
    {"method": method, "start_lr": 1e-3, "test_loss": loss, "diverged": loss is None}
    for method in ("tuned", "untuned")
    for loss in (0.35, 0.5, None)
]


@pytest.mark.parametrize(("make", "rows"), [(figures.quickstart, CURVES), (figures.fashion_mnist, STARTS)])
def test_a_figure_is_drawn_with_diverged_runs_among_its_rows(make, rows, tmp_path):
    figure = make(rows)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    shown = [text.get_text() for legend in (figure.legends or [figure.axes[0].get_legend()]) for text in legend.texts]
    assert "tuned by hypergrad" in shown
