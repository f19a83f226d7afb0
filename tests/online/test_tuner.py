"""The online tuner in users' loops: hypergradients against finite differences of those very loops."""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.online.live_loops import (
    FD_RTOL,
    LOOPS,
    STEPS,
    Loop,
    as_given,
    attach,
    data,
    difference,
    float64,
    groups,
    mse,
    sgd,
    two_layers,
    validation,
)

__all__ = ["float64"]  # the fixture


@pytest.mark.parametrize("name", LOOPS)
def test_hypergradient_of_a_live_loop_is_that_of_finite_differences(name):
    loop = LOOPS[name]
    model = two_layers()
    opt = loop.optimizer(model)
    tuner, scaler = attach(loop, model, opt)
    loop.run(model, opt, tuner.backward, scaler)
    assert tuner.stats["plain_steps"] == tuner.stats["changed_gradients"] == tuner.stats["capped"] == 0
    for hyper, gradient in tuner.hypergradients.items():
        for index in torch.cartesian_prod(*map(torch.arange, gradient.shape)).view(-1, gradient.dim()).tolist():
            expected = difference(loop, hyper, index[0], index[1] if len(index) > 1 else None)
            assert float(gradient[tuple(index)]) == pytest.approx(expected, rel=FD_RTOL), (hyper, index)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOOPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_tuner_trains_bit_identically(name, dtype):
    loop, results = LOOPS[name], []
    torch.set_default_dtype(dtype)
    for tuned in (False, True):
        model = two_layers()
        opt = loop.optimizer(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if loop.scaler else None
        backward = lambda loss: loss.backward()  # noqa: E731
        if tuned:
            tuner, scaler = attach(loop, model, opt, every=2, average=True)
            tuner.freeze()
            backward = tuner.backward
        loop.run(model, opt, backward, scaler)
        state = opt.state_dict()
        results.append((model.state_dict(), state["state"], state["param_groups"], torch.get_rng_state()))
    (a, sa, ga, ra), (b, sb, gb, rb) = results
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(sa[p][k], sb[p][k]) for p in sa for k in sa[p] if sa[p][k] is not None)
    assert ga == gb
    assert torch.equal(ra, rb)
    assert tuner.stats["val_evaluations"] == STEPS // 2 and tuner.stats["hyper_steps"] == 0


def test_backward_fills_every_leafs_grad_as_torch_does():
    a, b = two_layers(), two_layers()
    scale_a, scale_b = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    opt = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    tuner = as_given(a, opt, validation(a), tune=("lr",))
    opt_b = torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9)
    for batch in data()[0]:
        for model, scale, optimizer, backward in (
            (a, scale_a, opt, tuner.backward),
            (b, scale_b, opt_b, Tensor.backward),
        ):
            torch.manual_seed(3)
            optimizer.zero_grad()
            backward(scale * mse(model, batch))
        assert torch.equal(scale_a.grad, scale_b.grad)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or (torch.equal(p.grad, q.grad) and not p.grad.requires_grad and p.grad.is_leaf)
        tuner.freeze()
        opt.step()
        opt_b.step()


def test_tensor_in_the_loss_is_tuned():
    """The tangent of a penalty's strength, against finite differences."""

    def run(strength: Any, backward: Callable[[Tensor], None], model: nn.Sequential, opt: Any) -> float:
        torch.manual_seed(7)
        for batch in data()[0]:
            opt.zero_grad()
            backward(mse(model, batch) + strength() * sum((p**2).sum() for p in model.parameters()))
            opt.step()
        torch.manual_seed(11)
        return validation(model)().item()

    def at(x: float) -> float:
        model = two_layers()
        return run(lambda: x, lambda loss: loss.backward(), model, sgd(momentum=0.9)(model))

    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    spec = {"penalty": hypergrad.Hyperparameter(0.05, kind="positive")}
    loop = Loop(sgd(), wrt=())
    tuner, _ = attach(loop, model, opt, hypers=spec)
    before = tuner.values["penalty"].clone()
    run(lambda: tuner.hypers["penalty"], tuner.backward, model, opt)
    h = 1e-5
    expected = (at(0.05 + h) - at(0.05 - h)) / (2 * h)
    assert float(tuner.hypergradients["penalty"]) == pytest.approx(expected, rel=FD_RTOL)
    assert float(tuner.values["penalty"]) != float(before)


@pytest.mark.parametrize("mode", ["unrolled", "implicit", "forward"])
def test_step_moves_hyperparameters_in_every_mode(mode):
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.5)
    tuner = as_given(
        model, opt, validation(model), tune=("lr",), loss=mse, mode=mode, horizon=4, every=4, clip_norm=5.0
    )
    for _ in range(5):
        for batch in data()[0]:
            assert torch.isfinite(tuner.step(batch))
    assert tuner.stats["hyper_steps"] >= 13
    assert float(tuner.values["lr"]) > 1e-4


def test_unrolled_window_is_the_hypergradient_of_its_stretch():
    """The first window of tuner.step equals hypergrad.hypergradient over the same batches."""
    results = []
    for online in (True, False):
        model = two_layers()
        opt, validate = sgd(momentum=0.9)(model), validation(model)

        def val_loss(validate: Any = validate) -> Tensor:
            torch.manual_seed(11)
            return validate()

        torch.manual_seed(7)
        if online:
            tuner = as_given(model, opt, val_loss, loss=mse, mode="unrolled", horizon=STEPS, clip_norm=1.0)
            torch.manual_seed(7)
            for batch in data()[0]:
                tuner.step(batch)
            results.append(tuner.hypergradients)
        else:
            results.append(hypergrad.hypergradient(model, opt, mse, data()[0], val_loss, clip_norm=1.0).gradients)
    for name in ("lr", "weight_decay"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=0)


def test_plain_backward_is_counted_and_warned_of_once_and_trains_as_without():
    a, b = two_layers(), two_layers()
    opt_a, opt_b = sgd(momentum=0.9)(a), sgd(momentum=0.9)(b)
    tuner = as_given(a, opt_a, validation(a), every=1000)
    with pytest.warns(UserWarning, match="tuner.backward") as caught:
        for batch in data()[0]:
            for model, opt in ((a, opt_a), (b, opt_b)):
                torch.manual_seed(5)
                opt.zero_grad()
                mse(model, batch).backward()
                opt.step()
    assert len([w for w in caught if "tuner.backward" in str(w.message)]) == 1
    assert tuner.stats["plain_steps"] == STEPS
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_unknown_change_of_gradients_is_counted_and_resets_the_tangents():
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), every=1000)
    with pytest.warns(UserWarning, match="clip_norm"):
        for batch in data()[0][:3]:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.add_(torch.randn_like(p.grad))
            opt.step()
    assert tuner.stats["changed_gradients"] == 3


def test_accumulated_product_is_dropped_with_the_gradients():
    """zero_grad without a step in between: what was accumulated is void, also when zeros are kept."""
    for to_none in (True, False):
        model = two_layers()
        opt = sgd()(model)
        tuner = as_given(model, opt, validation(model), every=1000)
        for batch in data()[0][:4]:
            opt.zero_grad(set_to_none=to_none)
            tuner.backward(mse(model, batch))
            opt.zero_grad(set_to_none=to_none)
            tuner.backward(mse(model, batch))
            opt.step()
        assert tuner.stats["changed_gradients"] == tuner.stats["plain_steps"] == 0


def test_step_skipped_by_a_scaler_leaves_no_trace():
    """An overflow that GradScaler skips: hypergradients are those of the loop without that batch."""

    def run(overflow: bool) -> Any:
        model = two_layers()
        opt = sgd(momentum=0.8)(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        tuner = as_given(model, opt, validation(model), every=4, scaler=scaler, average=False)
        for i, (x, y) in enumerate(data()[0][:8]):
            for factor in (math.inf, 1.0) if overflow and i == 5 else (1.0,):
                torch.manual_seed(i)
                opt.zero_grad()
                tuner.backward(scaler.scale(mse(model, (x * factor, y))))
                scaler.step(opt)
                scaler.update()
        return tuner

    with_overflow, without = run(True), run(False)
    assert with_overflow.stats["changed_gradients"] == with_overflow.stats["plain_steps"] == 0
    for name, gradient in without.hypergradients.items():
        torch.testing.assert_close(with_overflow.hypergradients[name], gradient, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_bad_batch_does_nothing(bad, kind):
    model = two_layers()
    opt = kind(model.parameters(), lr=0.01)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=2)
    batches = data()[0]
    for i, (x, y) in enumerate(batches):
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        if i == 5:
            with pytest.warns(UserWarning, match="not finite"):
                tuner.backward(mse(model, (x * float(bad), y)))
                opt.step()
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        else:
            tuner.backward(mse(model, (x, y)))
            opt.step()
    assert tuner.stats["nonfinite_steps"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_blow_up_is_rolled_back():
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=100.0, momentum=0.9)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            for batch in data()[0]:
                opt.zero_grad()
                tuner.backward(mse(model, batch))
                opt.step()
                assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert tuner.stats["rollbacks"] > 0
    assert float(tuner.values["lr"]) < 10
    assert validation(model)().item() < 3


def test_nan_validation_loss_moves_nothing():
    model = two_layers()
    opt = sgd()(model)
    real, calls = validation(model), []

    def val_loss() -> Tensor:
        calls.append(0)
        return real() * (1 if len(calls) == 1 else math.nan)

    tuner = as_given(model, opt, val_loss, every=3)
    start = tuner.values
    with pytest.warns(UserWarning, match="not finite"):
        for batch in data()[0]:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
    assert tuner.stats["nonfinite_hypergradients"] == STEPS // 3
    assert all(torch.equal(start[k], tuner.values[k]) for k in start)


def test_zero_in_all_groups_starts_small_and_says_so():
    model = two_layers()
    opt = torch.optim.SGD(groups(model), lr=0.1)
    with pytest.warns(UserWarning, match="weight_decay is 0"):
        tuner = as_given(model, opt, validation(model))
    assert tuner.values["weight_decay"].tolist() == [1e-5, 1e-5]


def test_zero_in_some_groups_stays_zero():
    model = two_layers()
    parts = groups(model)
    parts[0]["weight_decay"] = 0.0
    opt = torch.optim.SGD(parts, lr=0.1, weight_decay=0.01)
    tuner = as_given(model, opt, validation(model), every=2)
    for batch in data()[0]:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
    assert opt.param_groups[0]["weight_decay"] == 0.0 == float(tuner.values["weight_decay"][0])
    assert opt.param_groups[1]["weight_decay"] != 0.01


def test_total_steps_gives_a_shape_that_ends_near_zero():
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = as_given(model, opt, validation(model), tune=("lr",), total_steps=STEPS, every=1000)
    used = []
    opt.register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for batch in data()[0]:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
    assert used == pytest.approx([0.1 * (STEPS - t) / STEPS for t in range(STEPS)])


def test_averaged_weights_are_put_in_and_taken_out():
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), every=4)
    for batch in data()[0]:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
    own = [p.detach().clone() for p in model.parameters()]
    with tuner.averaged() as averaged:
        assert averaged is model
        assert not torch.equal(model[0].weight, own[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own, strict=True))


def test_averaged_tangent_is_the_tangent_of_the_average():
    """With average=True the hypergradient is that of the validation loss at the running average."""

    def run(lr: float, tuned: bool) -> Any:
        model = two_layers()
        opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        validate = validation(model)

        def val_loss() -> Tensor:
            torch.manual_seed(11)
            return validate()

        tuner = as_given(model, opt, val_loss, tune=("lr",), every=STEPS)
        if not tuned:
            tuner.freeze()
        torch.manual_seed(7)
        for batch in data()[0]:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
        return tuner

    h = 1e-6
    expected = (run(0.05 + h, False).val_loss - run(0.05 - h, False).val_loss) / (2 * h)
    assert float(run(0.05, True).hypergradients["lr"]) == pytest.approx(expected, rel=FD_RTOL)


def test_state_dict_resumes_exactly(tmp_path):
    def make() -> Any:
        model = two_layers()
        opt = sgd(momentum=0.9)(model)
        return model, opt, as_given(model, opt, validation(model), every=3)

    def train(model: Any, opt: Any, tuner: Any, batches: Any, seed: int) -> None:
        torch.manual_seed(seed)
        for batch in batches:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()

    batches = data()[0]
    model, opt, tuner = make()
    train(model, opt, tuner, batches[:7], 1)
    torch.save({"m": model.state_dict(), "o": opt.state_dict(), "t": tuner.state_dict()}, tmp_path / "state.pt")
    train(model, opt, tuner, batches[7:], 2)
    again = make()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for x, key in zip(again, "mot", strict=True):
        x.load_state_dict(saved[key])
    train(*again, batches[7:], 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again[0].parameters(), strict=True))
    assert all(torch.equal(tuner.values[k], again[2].values[k]) for k in tuner.values)
    assert tuner.stats == again[2].stats


def test_state_dict_of_another_model_is_refused():
    a, b = two_layers(), nn.Linear(3, 1)
    opt_b = torch.optim.SGD(b.parameters(), lr=0.1, weight_decay=0.1)
    tuner_a = as_given(a, sgd()(a), validation(a))
    tuner_b = as_given(b, opt_b, lambda: b(torch.ones(1, 3)).sum())
    with pytest.raises(ValueError, match="another model"):
        tuner_b.load_state_dict(tuner_a.state_dict())
    with pytest.raises(ValueError, match="not the state_dict"):
        tuner_b.load_state_dict({})


def test_close_takes_every_hook_off():
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model))
    assert opt._optimizer_step_pre_hooks and opt._optimizer_step_post_hooks
    tuner.close()
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    opt.zero_grad()
    tuner.backward(mse(model, data()[0][0]))  # a closed tuner's backward is torch's own
    opt.step()
    assert tuner.stats["steps"] == 0


def test_two_optimizers_are_one_transition():
    """A list of optimizers gives the hypergradients of one optimizer with two groups."""
    found = []
    for split in (False, True):
        model = two_layers()
        parts = groups(model)
        kw = {"lr": 0.05, "weight_decay": 0.01, "momentum": 0.9}
        opts = [torch.optim.SGD([part], **kw) for part in parts] if split else [torch.optim.SGD(parts, **kw)]
        tuner = as_given(model, opts, validation(model), every=STEPS, average=False)
        torch.manual_seed(7)
        for batch in data()[0]:
            for opt in opts:
                opt.zero_grad()
            tuner.backward(mse(model, batch))
            for opt in opts:
                opt.step()
        found.append(tuner.hypergradients)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=0)


def test_graph_is_freed_after_backward_and_step():
    """Activations of a step do not outlive it, though the loop still holds loss and output."""
    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    tuner = as_given(model, opt, validation(model), every=3)
    alive: list[Any] = []
    model[1].register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
    for batch in data()[0]:
        opt.zero_grad()
        loss = mse(model, batch)
        tuner.backward(loss)
        opt.step()
        del loss
        assert all(ref() is None for ref in alive)


def test_window_is_freed():
    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    alive: list[Any] = []
    tuner = as_given(model, opt, validation(model), loss=mse, mode="unrolled", horizon=4)
    model[1].register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
    for batch in data()[0]:
        tuner.step(batch)
    assert all(ref() is None for ref in alive)
    assert not tuner._window.batches


BAD_TUNERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown name": ({"tune": ("learning_rate",)}, ValueError, "no param group has"),
    "nothing": ({"tune": ()}, ValueError, "nothing to tune"),
    "negative start": ({"tune": {"lr": -0.1}}, ValueError, "outside"),
    "NaN start": ({"tune": {"lr": math.nan}}, ValueError, "finite"),
    "mode": ({"mode": "backward"}, ValueError, "mode must be"),
    "horizon": ({"horizon": 0}, ValueError, "whole number"),
    "hyper_lr": ({"hyper_lr": -1.0}, ValueError, "positive"),
    "clip": ({"clip_norm": -1.0}, ValueError, "positive"),
    "wrong type": ({"tune": {"lr": "fast"}}, TypeError, "expected a hypergrad.Hyperparameter"),
}


@pytest.mark.parametrize("name", BAD_TUNERS)
def test_bad_arguments_raise_before_anything_changes(name):
    arguments, error, message = BAD_TUNERS[name]
    model = two_layers()
    opt = sgd()(model)
    before = repr(opt.state_dict())
    with pytest.raises(error, match=message):
        as_given(model, opt, validation(model), **arguments)
    assert repr(opt.state_dict()) == before
    assert not opt._optimizer_step_pre_hooks


def test_bad_losses():
    model = two_layers()
    opt = sgd()(model)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="shares no parameter"):
        as_given(model, opt, lambda: other(torch.ones(1, 2)).sum())
    with pytest.raises(ValueError, match="scalar"):
        as_given(model, opt, lambda: model(torch.ones(3, 5)))
    tuner = as_given(model, opt, validation(model), loss=mse)
    with pytest.raises(ValueError, match="scalar"):
        tuner.backward(model(torch.ones(3, 5)))
    with pytest.raises(ValueError, match="does not depend"):
        tuner.backward(torch.tensor(1.0))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        tuner.backward(other(torch.ones(1, 2)).sum())
    with pytest.raises(ValueError, match="failed on a batch"):
        tuner.step("nonsense")
    with pytest.raises(NotImplementedError, match="create_graph"):
        tuner.backward(mse(model, data()[0][0]), create_graph=True)
    with pytest.raises(NotImplementedError, match="LBFGS"):
        as_given(model, torch.optim.LBFGS(model.parameters()), validation(model))
    assert all(p.grad is None for p in model.parameters())


def test_backward_twice_on_a_freed_graph_raises():
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), every=1000)
    for batch in data()[0][:3]:
        opt.zero_grad()
        loss = mse(model, batch)
        tuner.backward(loss)
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="second time"):
            tuner.backward(loss)
        now = [p.grad for p in model.parameters()]
        assert all(
            (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(grads, now, strict=True)
        )
        opt.step()


def test_batchnorm_in_eval_mode_is_said_in_forward_mode_and_right_in_unrolled_mode():
    def make() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        _, batch = data()

        def val_loss() -> Tensor:
            model.eval()
            try:
                return mse(model, batch)
            finally:
                model.train()

        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), val_loss

    model, opt, val_loss = make()
    tuner = as_given(model, opt, val_loss, tune=("lr",))
    tuner.backward(mse(model, data()[0][0]))
    with pytest.warns(UserWarning, match="BatchNorm in eval mode"):
        opt.step()
    model, opt, val_loss = make()
    model[1].eval()
    model.train = lambda mode=True: model  # its statistics are fixed: there is no such path, and nothing to be said
    tuner = as_given(model, opt, val_loss, tune=("lr",))
    model[1].eval()
    tuner.backward(mse(model, data()[0][0]))
    opt.step()
    model, opt, val_loss = make()
    tuner = as_given(model, opt, val_loss, tune=("lr",), loss=mse, mode="unrolled", horizon=STEPS)
    for batch in data()[0]:
        tuner.step(batch)
    model, opt, val_loss = make()
    exact = hypergrad.hypergradient(model, opt, mse, data()[0], val_loss, wrt="lr").gradients["lr"]
    torch.testing.assert_close(tuner.hypergradients["lr"], exact, rtol=1e-9, atol=0)
