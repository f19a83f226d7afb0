"""Online tuner: modules whose gradients or buffers are out of the ordinary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from tests.online.live_loops import (
    FD_RTOL,
    STEPS,
    Backward,
    as_given,
    data,
    float64,
    matches_differences,
    mse,
    ordinary,
    slope,
    two_layers,
    validation,
)

__all__ = ["float64"]  # the fixture


class Heads(nn.Module):
    """Every other batch is for the other head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads, self.calls = nn.Linear(5, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.heads[self.calls // 2 % 2](self.body(x).tanh())


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_parameter_that_some_steps_do_not_use(kind: Any, set_to_none: bool) -> None:
    """Where zeros are kept it goes on moving by momentum and decay, where they are not it stands still."""

    def make() -> Any:
        model = Heads()
        kw = {"momentum": 0.8} if kind is torch.optim.SGD else {"eps": 1e-3}
        parts = [{"params": model.body.parameters()}, {"params": model.heads.parameters(), "lr": 0.02}]
        return model, kind(parts, lr=0.03, weight_decay=0.02, **kw)

    def train(model: Any, opt: Any, backward: Backward) -> None:
        model.calls = 0
        ordinary(model, opt, backward, set_to_none)
        model.calls = 0

    matches_differences(make, train, every=STEPS)


class Centred(nn.Module):
    """Puts a new tensor in its buffer's place at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(5))
        self.mu: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.mu = 0.9 * self.mu + 0.1 * x.mean(0)
        return x - self.mu


def centred() -> tuple[nn.Sequential, Any]:
    model = nn.Sequential(Centred(), *two_layers())
    parts = [{"params": model[1].parameters()}, {"params": model[4].parameters(), "lr": 0.03}]
    return model, torch.optim.SGD(parts, lr=0.05, weight_decay=0.01, momentum=0.8)


def test_buffer_that_is_replaced_in_a_live_loop() -> None:
    matches_differences(centred, ordinary)


def test_buffer_that_is_replaced_in_both_modes() -> None:
    found = {}
    for mode in ("forward", "unrolled"):
        model, opt = centred()
        before = model[0].mu
        torch.manual_seed(7)
        validate = validation(model)

        def val_loss(validate: Any = validate) -> Tensor:
            torch.manual_seed(11)
            return validate()

        with pytest.warns(UserWarning, match="changes the buffers 0.mu"):
            found[mode] = hypergrad.hypergradient(model, opt, mse, data()[0], val_loss, mode=mode).gradients
        assert model[0].mu is before and not before.any()
    live = matches_differences(centred, ordinary).hypergradients
    for name in live:
        torch.testing.assert_close(found["forward"][name], found["unrolled"][name], rtol=1e-9, atol=0)
        torch.testing.assert_close(found["forward"][name], live[name], rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:training changes 0.mu")
def test_frozen_tuner_leaves_a_buffer_that_is_replaced_bit_identical() -> None:
    results = []
    for tuned in (False, True):
        model, opt = centred()
        tuner = as_given(model, opt, validation(model), every=2)
        tuner.freeze() if tuned else tuner.close()
        torch.manual_seed(7)
        ordinary(model, opt, tuner.backward)
        results.append([*model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("by", ["tuner", "hypergradient"])
def test_hypergradients_where_val_loss_leaves_the_model_in_eval_mode(by: str) -> None:
    """Training goes on with dropout, as in the plain loop, which validates in eval mode and trains in train mode."""
    when = (STEPS // 2, STEPS)

    def plain(lr: float) -> float:
        model = two_layers()
        opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8)
        torch.manual_seed(7)
        losses = []
        for t, batch in enumerate(data()[0], 1):
            opt.zero_grad()
            mse(model.train(), batch).backward()
            opt.step()
            if t in when:
                losses.append(mse(model.eval(), data()[1]).item())
        return losses[-1] if by == "tuner" else sum(losses) / 2

    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    torch.manual_seed(7)
    val_loss = lambda: mse(model.eval(), data()[1])  # noqa: E731
    if by == "tuner":
        tuner = as_given(model, opt, val_loss, tune=("lr",), every=STEPS, average=False)
        ordinary(model, opt, tuner.backward)
        found = tuner.hypergradients["lr"]
    else:
        found = hypergrad.hypergradient(model, opt, mse, data()[0], val_loss, wrt="lr", val_steps=when).gradients["lr"]
    assert float(found) == pytest.approx(slope(lambda x: plain(0.05 + x)), rel=FD_RTOL)
    assert all(m.training for m in model.modules())


def test_linear_loss_frees_its_graph() -> None:
    model = nn.Linear(5, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=2)
    for x, _ in data()[0]:
        opt.zero_grad()
        loss = model(x).sum()
        tuner.backward(loss)
        with pytest.raises(RuntimeError, match="second time"):
            tuner.backward(loss)
        opt.step()


ACTIVATIONS = (
    "SiLU Mish GELU Softplus ELU CELU SELU LeakyReLU ReLU6 Hardswish Hardtanh LogSigmoid Softsign Tanhshrink Softshrink "
    "PReLU RReLU Sigmoid ReLU"
)
LAYERS: dict[str, Callable[[], nn.Module]] = {name: getattr(nn, name) for name in ACTIVATIONS.split()} | {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "LayerNorm": lambda: nn.LayerNorm([4, 6, 6]),
    "RMSNorm": lambda: nn.RMSNorm([6]),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "Dropout2d": lambda: nn.Dropout2d(0.3),
    "Softmax": lambda: nn.Softmax(dim=1),
    "LogSoftmax": lambda: nn.LogSoftmax(dim=1),
    "GLU": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GLU(dim=1)),
    "MaxPool2d": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Upsample(size=6)),
    "AvgPool2d": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(size=6, mode="bilinear")),
    "AdaptiveAvgPool2d": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Upsample(size=6, mode="bicubic")),
    "grouped convolution": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "dilated convolution": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "Linear": lambda: nn.Linear(6, 6),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_trains_bit_identically_under_a_frozen_tuner(layer: str, dtype: torch.dtype) -> None:
    """Also where torch computes another last bit when the graph of a gradient is kept (SiLU, Mish, GroupNorm)."""
    torch.set_default_dtype(dtype)
    batches = [(torch.randn(5, 3, 6, 6), torch.randn(5, 2)) for _ in range(6)]
    results: list[list[Tensor]] = []
    for tuned in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), LAYERS[layer](), nn.Flatten(), nn.Linear(144, 2))
        opt, grads = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
        tuner = as_given(model, opt, lambda model=model: mse(model, batches[0]), tune=("lr",), every=3)
        tuner.freeze() if tuned else tuner.close()
        torch.manual_seed(7)
        for batch in batches:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            opt.step()
        results.append([*grads, *model.state_dict().values()])
    assert tuner.stats["hessian_products"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class FirstAsIndex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x[..., 0] > 0).long()


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(4, 4, batch_first=True),
    "GRU": lambda: nn.GRU(4, 4, batch_first=True),
    "RNN": lambda: nn.RNN(4, 4, batch_first=True),
    "LSTM, two layers, both ways": lambda: nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True, dropout=0.2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "embedding": lambda: nn.Sequential(FirstAsIndex(), nn.Embedding(9, 4)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_layer_of_sequences_trains_bit_identically_under_a_frozen_tuner(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    batches = [(torch.randn(5, 3, 4), torch.randn(5, 3, 4)) for _ in range(6)]
    results: list[list[Tensor]] = []
    for tuned in (False, True):
        torch.manual_seed(0)
        model = SEQUENCES[name]()

        def loss(batch: Any, model: nn.Module = model) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                out = model(batch[0])
            return (((out[0] if isinstance(out, tuple) else out) - batch[1]) ** 2).mean()

        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        tuner = as_given(model, opt, lambda loss=loss: loss(batches[0]), tune=("lr",), every=3)
        tuner.freeze() if tuned else tuner.close()
        torch.manual_seed(7)
        for batch in batches:
            opt.zero_grad()
            tuner.backward(loss(batch))
            opt.step()
        results.append([*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
