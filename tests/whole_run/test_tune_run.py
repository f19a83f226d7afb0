"""The outer loop over whole runs: where it ends, that it goes on after a kill, and what it refuses."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

import hypergrad
from hypergrad import Hyperparameter, Run, tune_run
from hypergrad.whole_run.resume import NAME
from hypergrad.whole_run.step_rules import OuterSteps, Point

CURVATURE = torch.tensor([1.0, 0.25], dtype=torch.float64)


def quadratic(seed, lr=0.1, steps=4, **more):
    """θᵀ diag(c) θ/2 from θ₀ = (1, 2)·(seed + 1): θ_K = (1 − lr c)^K θ₀ by SGD."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]) * (seed + 1))

    def loss(model, batch):
        return (CURVATURE * model.weight**2).sum() / 2

    return Run(
        model, torch.optim.SGD(model.parameters(), lr=lr), [None] * steps, loss, lambda: loss(model, None), **more
    )


def objective(lr, steps=4, scale=1.0):
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64) * scale
    return float((CURVATURE * ((1 - lr * CURVATURE) ** steps * theta) ** 2).sum() / 2)


def best_lr(steps=4):
    grid = torch.linspace(0.5, 3.0, 25_001, dtype=torch.float64)
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    losses = (CURVATURE * ((1 - grid[:, None] * CURVATURE) ** steps * theta) ** 2).sum(1)
    return float(grid[losses.argmin()])


def numbers(result):
    """What is the same of two calls that found the same."""
    return result.values, result.value, result.history, result.run_equivalents, result.best_step


@pytest.mark.parametrize(
    ("outer", "outer_lr", "kind"), [("sign", 0.5, "positive"), ("adam", 0.5, "positive"), ("sgd", 0.5, "free")]
)
def test_a_quadratic_ends_at_its_optimum(outer, outer_lr, kind):
    found = tune_run(
        quadratic,
        {"lr": Hyperparameter(0.02, kind=kind)},
        outer=outer,
        outer_lr=outer_lr,
        outer_steps=30,
        horizons=(1.0,),
    )
    best = best_lr()
    assert found.value == pytest.approx(objective(best), rel=1e-2)
    assert found.value == pytest.approx(objective(float(found.values["lr"])), rel=1e-12)
    assert found.history[found.best_step]["value"] == found.value == min(row["value"] for row in found.history)
    assert found.values["lr"].tolist() == found.history[found.best_step]["values"]["lr"]


def test_horizons_grow_and_only_the_last_ones_values_count():
    found = tune_run(quadratic, {"lr": 0.02}, outer="sign", outer_lr=0.5, outer_steps=18, horizons=(0.25, 0.5, 1.0))
    seen = [row["horizon"] for row in found.history]
    assert seen == sorted(seen)
    assert set(seen) == {0.25, 0.5, 1.0}
    for row in found.history:  # a share of the run is its first batches
        assert row["value"] == pytest.approx(objective(row["values"]["lr"][0], round(4 * row["horizon"])), rel=1e-12)
    assert found.value == min(row["value"] for row in found.history if row["horizon"] == 1)
    assert found.history[found.best_step]["horizon"] == 1


def test_build_may_make_the_shorter_run_itself():
    asked = []

    def build(seed, horizon):
        asked.append(horizon)
        return quadratic(seed, steps=max(1, round(8 * horizon)))

    found = tune_run(build, {"lr": 0.1}, outer_steps=4, horizons=(0.25, 1.0))
    assert asked[0] == 1.0  # the whole run is looked at first
    assert set(asked[1:]) == {0.25, 1.0}
    assert found.stats["steps"] == 8


def test_the_mean_over_seeds_is_minimised():
    found = tune_run(quadratic, {"lr": 0.3}, seeds=(0, 2), outer_steps=3, horizons=(1.0,))
    for row in found.history:
        each = [objective(row["values"]["lr"][0], scale=seed + 1) for seed in (0, 2)]
        if row["best"]:
            assert row["seed_values"] == pytest.approx(each, rel=1e-12)
            assert row["value"] == pytest.approx(sum(each) / 2, rel=1e-12)


def test_cost_is_counted_in_plain_runs():
    """every=1, an accepted step: 2K gradients and K products of cost 2, hence 4 runs."""
    found = tune_run(quadratic, {"lr": 0.01}, outer_steps=1, horizons=(1.0,), every=1)
    assert found.run_equivalents == pytest.approx(
        (found.stats["gradient_evaluations"] + 2 * found.stats["hessian_products"]) / 4
    )
    assert found.run_equivalents == 4
    short = tune_run(quadratic, {"lr": 0.01}, outer_steps=2, horizons=(0.5, 1.0), every=1)
    assert short.history[0]["run_equivalents"] == 2


def test_a_worse_value_halves_the_step_goes_back_and_has_no_way_back():
    """From lr 0.5 a step of log 8 overshoots: the next is half as long, from the same point; a worse value costs one run."""
    found = tune_run(
        quadratic, {"lr": 0.5}, outer="sign", outer_lr=math.log(8), outer_steps=3, horizons=(1.0,), every=1
    )
    first, second, third = found.history
    assert [row["values"]["lr"][0] for row in found.history] == pytest.approx([0.5, 4.0, 0.5 * 8**0.5])
    assert (first["best"], second["best"]) == (True, False)
    assert (first["size"], second["size"]) == (1.0, 0.5)
    assert second["run_equivalents"] - first["run_equivalents"] == 1
    assert second["gradient_norm"] is None
    assert found.stats["halvings"] >= 1
    assert found.stats["not_finite"] == 0
    assert not found.stats["warnings"]
    assert third["value"] == pytest.approx(objective(0.5 * 8**0.5), rel=1e-12)


def test_signs_have_a_length_each():
    steps = OuterSteps("sign", 1.0, 3)
    zero = torch.zeros(3, dtype=torch.float64)
    steps.take(Point(2.0, zero, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), 0))
    assert steps.next().tolist() == [-1.0, 1.0, 0.0]
    steps.take(Point(1.0, zero, torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64), 1))
    assert steps.next().tolist() == [-1.2, -0.5, 0.0]


def blowing_up(seed):
    """A validation loss that is NaN from lr 1 on."""
    run = quadratic(seed)
    lr = run.optimizer.param_groups[0]
    return run._replace(val_loss=lambda: run.val_loss() * (math.nan if lr["lr"] >= 1 else 1.0))


@pytest.mark.parametrize("outer", ["sign", "adam", "sgd"])
def test_nan_is_stepped_back_from_and_said(outer):
    with pytest.warns(UserWarning, match="value is not finite; stepped back"):
        found = tune_run(blowing_up, {"lr": 0.3}, outer=outer, outer_lr=3.0, outer_steps=8, horizons=(1.0,))
    assert found.stats["not_finite"] >= 1
    assert any("not finite" in text for text in found.stats["warnings"])
    assert math.isfinite(found.value)
    assert all(math.isfinite(x) for row in found.history for x in row["values"]["lr"])
    assert found.values["lr"] < 1


def test_a_start_that_is_not_finite_takes_a_tenth_of_lr_or_is_refused():
    with pytest.warns(UserWarning, match="not finite"):
        found = tune_run(blowing_up, {"lr": 5.0}, outer_steps=3, horizons=(1.0,))
    assert [round(row["values"]["lr"][0], 9) for row in found.history[:2]] == [5.0, 0.5]
    assert math.isfinite(found.value)
    with pytest.raises(ValueError, match="start is not finite, so there is no step to take"):
        tune_run(blowing_up, {"lr": Hyperparameter(5.0, kind="free")}, outer_steps=3, horizons=(1.0,))


def test_a_longer_horizon_that_is_not_finite_goes_half_way_back_to_the_start():
    def build(seed, horizon):
        run = quadratic(seed)
        lr = run.optimizer.param_groups[0]
        return run._replace(val_loss=lambda: run.val_loss() * (math.nan if horizon == 1 and lr["lr"] > 0.5 else 1.0))

    with pytest.warns(UserWarning, match="not finite"):
        found = tune_run(build, {"lr": 0.1}, outer="sign", outer_lr=1.0, outer_steps=8, horizons=(0.5, 1.0))
    whole = [row for row in found.history if row["horizon"] == 1]
    assert math.isnan(whole[0]["value"])
    assert whole[1]["values"]["lr"][0] == pytest.approx((0.1 * whole[0]["values"]["lr"][0]) ** 0.5)
    assert math.isfinite(found.value)


def test_no_finite_run_at_the_last_horizon_is_said_and_values_are_those_of_a_shorter_one():
    def build(seed, horizon):
        run = quadratic(seed)
        return run._replace(val_loss=lambda: run.val_loss() * (math.nan if horizon == 1 else 1.0))

    with pytest.warns(UserWarning, match="no evaluation at horizon 1 was finite"):
        found = tune_run(build, {"lr": 0.1}, outer_steps=4, horizons=(0.5, 1.0))
    assert math.isnan(found.value)
    assert bool(torch.isfinite(found.values["lr"]).all())
    assert found.history[found.best_step]["horizon"] == 0.5


# ---- hyperparameters of every kind


def test_a_tensor_in_the_loss_is_learned():
    """min over w of the loss of a step along Σ w_i g_i: the target is reached with w = (1, 0)."""
    target = torch.tensor([[1.0, 0.0]])

    def build(seed):
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        loss = lambda model, batch, hypers: -(hypers["w"] * model.weight[0]).sum()  # noqa: E731
        val_loss = lambda: ((model.weight - target) ** 2).sum()  # noqa: E731
        return Run(model, torch.optim.SGD(model.parameters(), lr=1.0), [None], loss, val_loss)

    found = tune_run(build, {"w": torch.tensor([0.3, 0.6])}, outer="sgd", outer_lr=0.4, outer_steps=25, horizons=(1.0,))
    torch.testing.assert_close(found.values["w"], torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)


def test_knots_of_a_schedule_are_learned():
    def build(seed):
        plan = {"lr": lambda t, h: hypergrad.schedules.knots(t / 4, h["knots"])}
        return quadratic(seed, schedules=plan)

    start = Hyperparameter(torch.tensor([0.3, 0.1, 0.03], dtype=torch.float64), kind="positive")
    found = tune_run(build, {"knots": start}, outer="sign", outer_lr=0.5, outer_steps=25, horizons=(1.0,))
    assert found.values["knots"].shape == (3,)
    assert found.value < objective(best_lr())  # more than any single lr can do
    lr = [float(hypergrad.schedules.knots(t / 4, found.values["knots"])) for t in range(4)]
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64) * math.prod(1 - x * CURVATURE for x in lr)
    assert found.value == pytest.approx(float((CURVATURE * theta**2).sum() / 2), rel=1e-9)


def test_numbers_of_groups_bounds_and_a_clipping_threshold():
    def build(seed):
        run = quadratic(seed)
        extra = nn.Linear(1, 1, bias=False).double()
        model = nn.ModuleList([run.model, extra])
        loss = lambda _, batch: run.val_loss() + (extra.weight**2).sum()  # noqa: E731
        groups = [{"params": run.model.parameters()}, {"params": extra.parameters(), "lr": 0.02}]
        return Run(model, torch.optim.Adam(groups, lr=0.1), [None] * 3, loss, lambda: loss(None, None))

    hypers = {"lr": Hyperparameter(bounds=(0.01, 0.12)), "betas": None, "clip_norm": 0.5}
    found = tune_run(build, hypers, outer="sign", outer_lr=0.3, outer_steps=4, horizons=(1.0,))
    assert found.history[0]["values"]["lr"] == pytest.approx([0.1, 0.02])
    assert found.history[0]["values"]["clip_norm"] == 0.5
    assert found.values["betas"].shape == (2, 2)
    for row in found.history:
        assert all(0.01 * (1 - 1e-9) <= x <= 0.12 * (1 + 1e-9) for x in row["values"]["lr"])
    assert found.value < found.history[0]["value"]


def test_what_build_hands_out_twice_and_random_numbers_are_as_before():
    run = quadratic(0)
    weight, lr = run.model.weight.detach().clone(), run.optimizer.param_groups[0]["lr"]

    def build(seed):
        torch.rand(3)
        return run

    state = torch.get_rng_state()
    found = tune_run(build, {"lr": 0.7}, outer_steps=2, horizons=(1.0,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run.model.weight, weight)
    assert run.optimizer.param_groups[0]["lr"] == lr != float(found.values["lr"])


# ---- a call that is killed


class Killed(Exception):
    pass


def killed_after(evaluations):
    """`quadratic`, but the build of that evaluation fails. The first build is only looked at."""
    calls = []

    def build(seed):
        calls.append(seed)
        if len(calls) == evaluations + 2:
            raise Killed
        return quadratic(seed)

    return build


OPTIONS = {"outer_steps": 9, "horizons": (0.5, 1.0), "outer_lr": 0.7}


@pytest.mark.parametrize("outer", ["sign", "adam", "sgd"])
@pytest.mark.parametrize("after", [0, 2, 5, 8])
def test_a_killed_call_goes_on_as_if_nothing_had_happened(tmp_path, outer, after):
    whole = tune_run(quadratic, {"lr": 0.02}, outer=outer, **OPTIONS)
    with pytest.raises(Killed):
        tune_run(killed_after(after), {"lr": 0.02}, outer=outer, log_dir=tmp_path, **OPTIONS)
    assert (tmp_path / NAME).is_file() == (after > 0)
    resumed = tune_run(quadratic, {"lr": 0.02}, outer=outer, log_dir=tmp_path, **OPTIONS)
    assert numbers(resumed) == numbers(whole)

    def never(seed):
        return quadratic(seed)._replace(loss=lambda model, batch: pytest.fail("a finished study was run again"))

    assert numbers(tune_run(never, {"lr": 0.02}, outer=outer, log_dir=tmp_path, **OPTIONS)) == numbers(whole)


def test_more_outer_steps_go_on(tmp_path):
    first = tune_run(quadratic, {"lr": 0.02}, log_dir=tmp_path, outer_steps=3, horizons=(1.0,))
    more = tune_run(quadratic, {"lr": 0.02}, log_dir=tmp_path, outer_steps=6, horizons=(1.0,))
    assert more.history[:3] == first.history
    assert numbers(more) == numbers(tune_run(quadratic, {"lr": 0.02}, outer_steps=6, horizons=(1.0,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hypers": {"lr": 0.03}}, "start: .* there, .* here"),
        ({"hypers": {"lr": 0.02, "weight_decay": 0.1}}, "names: "),
        ({"outer": "sign"}, "outer: "),
        ({"seeds": (0, 1)}, "seeds: "),
        ({"horizons": (0.5, 1.0)}, "horizons: "),
        ({"mode": "forward"}, "mode: "),
        ({"build": lambda seed: quadratic(seed, steps=5)}, "run: "),
        ({"every": 2}, "options: "),
    ],
)
def test_a_file_of_another_study_is_refused(tmp_path, change, message):
    own = {"build": quadratic, "hypers": {"lr": 0.02}, "outer_steps": 2, "horizons": (1.0,)}
    tune_run(**own, log_dir=tmp_path)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(ValueError, match="of another study .*" + message):
        tune_run(**own | change, log_dir=tmp_path)
    assert (tmp_path / NAME).read_bytes() == before


def test_a_torn_file_and_resume_false_are_said(tmp_path):
    own = {"build": quadratic, "hypers": {"lr": 0.02}, "outer_steps": 1, "horizons": (1.0,), "log_dir": tmp_path}
    tune_run(**own)
    with pytest.raises(ValueError, match="already: pass resume=True"):
        tune_run(**own, resume=False)
    (tmp_path / NAME).write_text('{"study": {')
    with pytest.raises(ValueError, match=r"cannot be read .* delete it"):
        tune_run(**own)


def test_curves_and_json_lines(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = tune_run(quadratic, {"lr": 0.02}, log_dir=tmp_path, outer_steps=4, horizons=(0.5, 1.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["hyper/lr"] for row in rows] == [row["values"]["lr"][0] for row in found.history]
    assert [row["loss/val"] for row in rows] == [row["value"] for row in found.history]
    assert [row["run/horizon"] for row in rows] == [row["horizon"] for row in found.history]
    reader = event_accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()
    tags = {"hyper/lr", "hypergradient/lr", "loss/val", "run/horizon", "run/size", "run/run_equivalents"}
    assert tags == set(reader.Tags()["scalars"])


# ---- `below`


def test_below_spares_the_way_back():
    run = quadratic(0)
    arguments = (run.model, run.optimizer, run.loss, run.batches, run.val_loss, "lr")
    whole = hypergrad.hypergradient(*arguments, val_steps=(1, 4))
    for below in (float(whole.value) + 1e-9, math.inf):
        same = hypergrad.hypergradient(*arguments, val_steps=(1, 4), below=below)
        assert float(same.value) == float(whole.value)
        assert torch.equal(same.gradients["lr"], whole.gradients["lr"])
    spared = hypergrad.hypergradient(*arguments, val_steps=(1, 4), below=float(whole.value) - 1e-9)
    assert float(spared.value) == pytest.approx(float(whole.value), rel=1e-14)
    assert spared.gradients["lr"].isnan().all()
    assert spared.stats["gradient_evaluations"] == 4
    assert spared.stats["hessian_products"] == 0


# ---- bad input


def scheduled(seed):
    run = quadratic(seed)
    torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    return run


BAD = {
    "build": ({"build": 3}, TypeError, "build must be a function"),
    "no run": ({"build": lambda seed: 3}, TypeError, "build must return hypergrad.Run"),
    "no batches": ({"build": lambda seed: quadratic(seed, steps=0)}, ValueError, "without batches"),
    "a scheduler": ({"build": scheduled}, ValueError, "a scheduler is attached"),
    "hypers": ({"hypers": ["lr"]}, TypeError, "hypers must be a dict"),
    "no hypers": ({"hypers": {}}, ValueError, "hypers is empty"),
    "an unknown name": ({"hypers": {"lrr": 0.1}}, ValueError, "'lrr' is no number of the param groups"),
    "a word": ({"hypers": {"lr": "0.1"}}, TypeError, "expected a hypergrad.Hyperparameter"),
    "outside its kind": ({"hypers": {"lr": -1.0}}, ValueError, "outside"),
    "outer": ({"outer": "adamw"}, ValueError, "outer must be one of adam, sign, sgd"),
    "outer_lr": ({"outer_lr": 0.0}, ValueError, "outer_lr must be a positive"),
    "outer_steps": ({"outer_steps": 2}, ValueError, "at least one a horizon"),
    "seeds": ({"seeds": ()}, ValueError, "seeds must be different"),
    "a seed twice": ({"seeds": (1, 1)}, ValueError, "seeds must be different"),
    "horizons": ({"horizons": (0.5, 0.25)}, ValueError, "increasing shares"),
    "a horizon above 1": ({"horizons": (0.5, 2.0)}, ValueError, "increasing shares"),
    "mode": ({"mode": "backward"}, ValueError, "mode must be one of"),
    "an option": ({"evry": 3}, ValueError, "does not take 'evry'; it takes every"),
    "below": ({"below": 0.3}, ValueError, "does not take 'below'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_before_any_work(case, tmp_path):
    change, error, message = BAD[case]
    arguments = {"build": quadratic, "hypers": {"lr": 0.1}, "outer_steps": 3, "log_dir": tmp_path / "log"} | change
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            tune_run(**arguments)
    assert not (tmp_path / "log").exists()


def test_a_name_that_has_a_schedule_is_refused():
    build = lambda seed: quadratic(seed, schedules={"lr": lambda t, h: 0.1})  # noqa: E731
    with pytest.raises(ValueError, match="has a schedule: tune what the schedule reads"):
        tune_run(build, {"lr": 0.1})


# ---- tensors and nets of the user's own


class OwnTensors:
    """Two steps of SGD on a c (θ − 1)²/2, then L = c' θ², c' = 1 + c²: read as `hypers`, from a closure, or held by a net."""

    def __init__(self, way):
        self.way, self.c = way, torch.tensor(0.7, dtype=torch.float64)
        self.net = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            self.net.weight.fill_(0.7)

    @property
    def hypers(self):
        return {"net": self.net} if self.way == "net" else {"c": self.c}

    @property
    def now(self):
        return self.net(torch.ones(1, dtype=torch.float64))[0] if self.way == "net" else self.c

    def build(self, seed):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(model.weight, 2.0)
        if self.way == "argument":
            loss = lambda model, batch, hypers: (hypers["c"] * (model.weight - 1) ** 2 / 2).sum()  # noqa: E731
        else:
            loss = lambda model, batch: (self.now * (model.weight - 1) ** 2 / 2).sum()  # noqa: E731
        val_loss = lambda: ((1 + self.now**2) * model.weight**2).sum()  # noqa: E731
        return Run(model, torch.optim.SGD(model.parameters(), lr=0.5), [None] * 2, loss, val_loss)

    @staticmethod
    def objective(c):
        """θ − 1 is multiplied by 1 − c/2 in each step."""
        return (1 + c**2) * (1 + (1 - c / 2) ** 2) ** 2


@pytest.mark.parametrize("way", ["closure", "argument", "net"])
def test_a_tensor_that_val_loss_reads_too(way):
    """The best c is that of the closed form, to which the direct term belongs; what the user holds is put back."""
    own = OwnTensors(way)
    found = tune_run(own.build, own.hypers, outer="sgd", outer_lr=0.1, outer_steps=40, horizons=(1.0,))
    grid = [i / 1000 for i in range(2000)]
    best = min(grid, key=OwnTensors.objective)
    name = "net.weight" if way == "net" else "c"
    assert float(found.values[name]) == pytest.approx(best, abs=2e-3)
    assert found.history[0]["value"] == pytest.approx(OwnTensors.objective(0.7), rel=1e-12)
    h = 1e-5
    slope = (OwnTensors.objective(0.7 + h) - OwnTensors.objective(0.7 - h)) / (2 * h)
    assert found.history[0]["gradient_norm"] == pytest.approx(abs(slope), rel=1e-6)
    assert float(own.c) == 0.7 and not own.c.requires_grad and own.c.grad is None
    assert float(own.net.weight.detach()) == 0.7 and own.net.weight.requires_grad and own.net.weight.grad is None


def test_what_nothing_reads_is_an_error():
    own = OwnTensors("closure")
    with pytest.raises(ValueError, match="nothing reads hypers"):
        tune_run(own.build, {"c": own.c.clone()}, outer_steps=3)
    with pytest.raises(ValueError, match="takes no third"):
        tune_run(own.build, {"c": 0.7}, outer_steps=3)
    with pytest.raises(ValueError, match="computed from other tensors"):
        tune_run(own.build, {"c": own.c.requires_grad_() * 1}, outer_steps=3)


@pytest.mark.parametrize("name", ["eps", "alpha", "momentum_decay"])
def test_a_tensor_in_the_loss_is_free_whatever_its_name(name):
    def build(seed):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(model.weight, 2.0)
        loss = lambda model, batch, h: ((model.weight - h[name]) ** 2).sum()  # noqa: E731
        val_loss = lambda: (model.weight + 1).square().sum()  # noqa: E731
        return Run(model, torch.optim.SGD(model.parameters(), lr=0.4), [None], loss, val_loss)

    found = tune_run(build, {name: 0.5}, outer="sgd", outer_lr=0.4, outer_steps=30, horizons=(1.0,))
    assert float(found.values[name]) == pytest.approx(-1.75, abs=1e-3)  # θ = 0.2 · 2 + 0.8 x = −1


def test_what_is_printed_has_the_numbers_and_not_every_step() -> None:
    found = tune_run(quadratic, {"lr": 0.01}, outer_steps=3, horizons=(1.0,))
    assert len(found.history) == 3
    assert f"value={found.value:.6g}" in repr(found) and f"{float(found.values['lr']):.6g}" in repr(found)
    assert "stopped" in repr(found) and len(repr(found)) < 400
