"""The layer table as data: small nets with one layer each, and what comes of their hypergradient.

A row is trained for three steps of SGD with momentum in float64, and its hypergradient in lr and weight decay (of two param
groups) is held against central differences of the stock loop. Expected is one of

    exact       it agrees
    rounded     float32 or bfloat16: it agrees with the differences of the same net in float64, loosely
    warned      it is off, and a warning says what is left out
    refused     NotImplementedError, which names the layer and a way out

`tests/test_layers.py` holds every row; `scripts/layers.py` writes what came of it to docs/layers.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import Case
from tests.layer_nets import (
    Applied,
    Autocast,
    Checkpointed,
    Compiled,
    Cube,
    Decoder,
    First,
    Loss,
    Math,
    OnceDifferentiable,
    Sdpa,
    SelfAttention,
    against_one_hot,
    ctc,
    embedded,
    features,
    images,
    in_float32,
    kl,
    multi_margin,
    nll,
    of_features,
    of_images,
    of_indices,
    of_sequences,
    of_signals,
    sequences,
    signals,
    triplet,
    uncompiled,
    weighted,
    with_logits,
)
from tests.oracle import AGREE, finite_difference, hypergradient
from tests.problems import DEVICE, Setup, ce, randint

STEPS = 3
TRAIN, EVAL, THEN_EVAL = "train", "eval", "validated in eval"


@dataclass(frozen=True)
class Row:
    """One layer in a net.

    Args:
        build: the net.
        data: the inputs of batch i.
        expected: exact, rounded, warned or refused.
        says: of a warning or an error, as a regular expression.
        mode: train, eval (throughout), or trained in train mode and validated in eval mode.
        loss: of the net and a batch (inputs, classes 0 … 2).
        dtype: what it is trained in.
        tolerance: relative to the largest element of an array.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    expected: str = "exact"
    says: str = ""
    mode: str = TRAIN
    loss: Loss = ce
    dtype: torch.dtype = torch.float64
    tolerance: float = AGREE


class Outcome(NamedTuple):
    outcome: str
    error: float | None  # relative; None where refused
    says: str = ""


@dataclass(frozen=True)
class LayerCase(Case):
    """A row of the table as a case of the oracle; `low` for its own precision in place of float64."""

    optimizer: str = "momentum"
    wrt: tuple[str, ...] | None = ("lr", "weight_decay")
    low: bool = False

    def build(self) -> Setup:
        row = LAYERS[self.problem]
        dtype = row.dtype if self.low else torch.float64
        torch.manual_seed(0)
        model = row.build().to(DEVICE, dtype).train(row.mode != EVAL)
        params = list(model.parameters())
        half = (len(params) + 1) // 2
        batches = []
        for i in (*range(STEPS), 99):
            x = row.data(i)
            batches.append((x.to(dtype) if x.is_floating_point() else x, randint(3, len(x), seed=1000 + i)))
        val = batches.pop()

        def val_loss() -> Tensor:
            model.train(row.mode == TRAIN)
            try:
                return row.loss(model, val)
            finally:
                model.train(row.mode != EVAL)

        setup = Setup(model, [params[:half], params[half:]], row.loss, batches, val_loss)
        setup.optimizer = self.row.make(setup.groups)
        torch.manual_seed(7)  # what dropout draws from
        return setup


def outcome_of(name: str, mode: str) -> Outcome:
    """What comes of a row in one mode of differentiation."""
    row = LAYERS[name]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # torch has some of its own, while building and compiling
        try:
            result = hypergradient(LayerCase(name, low=True), mode=mode)
        except NotImplementedError as error:
            return Outcome("refused", None, str(error))
        case, worst = LayerCase(name), 0.0
        for hyper in case.names:
            array = result.gradients[hyper].double().cpu()
            want = torch.tensor([finite_difference(case, hyper, (i,)) for i in range(2)], dtype=torch.float64)
            worst = max(worst, float((array - want).abs().max() / want.abs().max()))
    heard = {str(w.message) for w in seen}
    said = " ".join(w for w in result.stats["warnings"] if w in heard)
    fine = "exact" if row.dtype == torch.float64 else "rounded"
    return Outcome("warned" if said else fine if worst <= row.tolerance else "wrong", worst, said)


# ---- the table

OF_STATS = r"running_mean, .*running_var; a path through them"
FLOAT32, BFLOAT16 = 1e-4, 0.1  # what is asked of rows in those, relative


def _encoder(dropout: float = 0.0) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout, activation="gelu", batch_first=True)


def _norms() -> dict[str, Row]:
    rows = {}
    for mode in (TRAIN, EVAL):
        rows |= {
            f"BatchNorm1d, {mode}": Row(lambda: features(nn.BatchNorm1d(6)), of_features, mode=mode),
            f"BatchNorm2d, {mode}": Row(lambda: images(nn.BatchNorm2d(4)), of_images, mode=mode),
            f"LayerNorm, {mode}": Row(lambda: sequences(nn.LayerNorm(4)), of_sequences, mode=mode),
            f"GroupNorm, {mode}": Row(lambda: images(nn.GroupNorm(2, 4)), of_images, mode=mode),
            f"InstanceNorm1d, {mode}": Row(lambda: signals(nn.InstanceNorm1d(4, affine=True)), of_signals, mode=mode),
            f"InstanceNorm2d, {mode}": Row(lambda: images(nn.InstanceNorm2d(4)), of_images, mode=mode),
            f"RMSNorm, {mode}": Row(lambda: sequences(nn.RMSNorm(4)), of_sequences, mode=mode),
            f"LocalResponseNorm, {mode}": Row(lambda: images(nn.LocalResponseNorm(2, 0.5)), of_images, mode=mode),
            f"weight_norm (utils), {mode}": Row(
                lambda: features(nn.utils.weight_norm(nn.Linear(6, 6))), of_features, "refused",
                r"^weight_norm on 2 has .*register", mode=mode,
            ),
            f"weight_norm (parametrizations), {mode}": Row(
                lambda: features(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), of_features, "refused",
                r"^weight_norm on 2 has .*remove_parametrizations", mode=mode,
            ),
        }  # fmt: skip
        warned = ("warned", r"_u, .*_v; a path through them") if mode == TRAIN else ("exact",)
        for kind, norm in (
            ("utils", nn.utils.spectral_norm),
            ("parametrizations", nn.utils.parametrizations.spectral_norm),
        ):
            rows[f"spectral_norm ({kind}), {mode}"] = Row(
                lambda norm=norm: features(norm(nn.Linear(6, 6))), of_features, *warned, mode=mode
            )
    rows["BatchNorm1d, validated in eval"] = Row(lambda: features(nn.BatchNorm1d(6)), of_features, mode=THEN_EVAL)
    rows["BatchNorm2d, validated in eval"] = Row(lambda: images(nn.BatchNorm2d(4)), of_images, mode=THEN_EVAL)
    rows["BatchNorm1d(momentum=None), validated in eval"] = Row(
        lambda: features(nn.BatchNorm1d(6, momentum=None)), of_features, mode=THEN_EVAL
    )
    rows["parametrizations.orthogonal"] = Row(
        lambda: features(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))), of_features
    )
    rows["InstanceNorm1d with running statistics, validated in eval"] = Row(
        lambda: signals(nn.InstanceNorm1d(4, track_running_stats=True)), of_signals, "warned", OF_STATS, mode=THEN_EVAL
    )
    return rows


LAYERS: dict[str, Row] = {
    "Linear": Row(lambda: features(nn.Linear(6, 6)), of_features),
    "Conv1d": Row(lambda: signals(nn.Conv1d(4, 4, 3, padding=1)), of_signals),
    "Conv2d": Row(lambda: images(nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")), of_images),
    "ConvTranspose2d": Row(lambda: images(nn.ConvTranspose2d(4, 1, 2, stride=2)), of_images),
    "Upsample, bilinear": Row(lambda: images(nn.Upsample(scale_factor=2, mode="bilinear"), out=256), of_images),
    **_norms(),
    "Dropout, validated in eval": Row(lambda: features(nn.Dropout(0.5)), of_features, mode=THEN_EVAL),
    "Dropout2d, validated in eval": Row(lambda: images(nn.Dropout2d(0.5)), of_images, mode=THEN_EVAL),
    "Dropout, eval": Row(lambda: features(nn.Dropout(0.5)), of_features, mode=EVAL),
    "Embedding": Row(lambda: embedded(nn.Embedding(9, 4, padding_idx=0)), of_indices),
    "Embedding with max_norm": Row(
        lambda: embedded(nn.Embedding(9, 4, max_norm=1.0)), of_indices, "refused", r"^nn.Embedding '0' has max_norm.*=None"
    ),
    "Embedding with scale_grad_by_freq": Row(
        lambda: embedded(nn.Embedding(9, 4, scale_grad_by_freq=True)), of_indices, "refused", r"scale_grad_by_freq=False"
    ),
    "Embedding(sparse=True)": Row(
        lambda: embedded(nn.Embedding(9, 4, sparse=True)), of_indices, "refused", r"^an embedding with sparse=True.*sparse=False"
    ),
    "EmbeddingBag": Row(
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Tanh(), nn.Linear(4, 3)), of_indices,
        "refused", r"^nn.EmbeddingBag .*nn.Embedding",
    ),
    "RNN": Row(lambda: sequences(First(nn.RNN(4, 4, batch_first=True))), of_sequences),
    "GRU": Row(lambda: sequences(First(nn.GRU(4, 4, batch_first=True))), of_sequences),
    "GRU, bidirectional": Row(lambda: sequences(First(nn.GRU(4, 2, bidirectional=True, batch_first=True))), of_sequences),
    "LSTM": Row(lambda: sequences(First(nn.LSTM(4, 4, batch_first=True))), of_sequences),
    "LSTM of two layers with dropout, validated in eval": Row(
        lambda: sequences(First(nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True))), of_sequences, mode=THEN_EVAL
    ),
    "LSTM, float32": Row(
        lambda: sequences(First(nn.LSTM(4, 4, batch_first=True))), of_sequences, "rounded",
        dtype=torch.float32, tolerance=FLOAT32,
    ),
    "MultiheadAttention": Row(lambda: sequences(SelfAttention()), of_sequences),
    "MultiheadAttention(need_weights=False)": Row(lambda: sequences(SelfAttention(need_weights=False)), of_sequences),
    "scaled_dot_product_attention": Row(lambda: sequences(Sdpa()), of_sequences),
    "scaled_dot_product_attention, causal": Row(lambda: sequences(Sdpa(is_causal=True)), of_sequences),
    "scaled_dot_product_attention, its MATH kernel": Row(lambda: sequences(Math(Sdpa())), of_sequences),
    "TransformerEncoderLayer": Row(lambda: sequences(_encoder()), of_sequences),
    "TransformerEncoderLayer with dropout, validated in eval": Row(
        lambda: sequences(_encoder(0.2)), of_sequences, mode=THEN_EVAL
    ),
    "TransformerDecoderLayer": Row(lambda: sequences(Decoder()), of_sequences),
    "MaxPool1d": Row(lambda: signals(nn.MaxPool1d(2), out=12), of_signals),
    "MaxPool2d": Row(lambda: images(nn.MaxPool2d(2), out=16), of_images),
    "AvgPool1d": Row(lambda: signals(nn.AvgPool1d(2), out=12), of_signals),
    "AvgPool2d": Row(lambda: images(nn.AvgPool2d(2), out=16), of_images),
    "AdaptiveAvgPool2d": Row(lambda: images(nn.AdaptiveAvgPool2d(3), out=36), of_images),
    "AdaptiveMaxPool2d": Row(lambda: images(nn.AdaptiveMaxPool2d(3), out=36), of_images),
    "LPPool2d": Row(lambda: images(nn.LPPool2d(2, 2), out=16), of_images),
    "checkpoint": Row(
        lambda: features(Checkpointed(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)), False)), of_features, mode=THEN_EVAL
    ),
    "checkpoint(use_reentrant=True)": Row(
        lambda: features(Checkpointed(nn.Linear(6, 6), True)), of_features,
        "refused", r"^checkpoint with use_reentrant=True.*use_reentrant=False",
    ),
    "autocast to bfloat16": Row(
        lambda: Autocast(features(nn.Linear(6, 6), nn.Tanh())), of_features, "rounded",
        dtype=torch.float32, tolerance=BFLOAT16, loss=in_float32,
    ),
    "autograd.Function": Row(lambda: features(Applied(Cube.apply)), of_features),
    "autograd.Function, @once_differentiable": Row(
        lambda: features(Applied(OnceDifferentiable.apply)), of_features, "refused", r"OnceDifferentiable.*once_differentiable"
    ),
    "torch.compile": Row(Compiled, of_features),
    "torch.compile, its _orig_mod": Row(Compiled, of_features, loss=uncompiled),
    **{
        name: Row(lambda name=name: features(getattr(nn, name)()), of_features)
        for name in (
            "ReLU", "LeakyReLU", "PReLU", "RReLU", "ReLU6", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Softplus", "Softsign",
            "Sigmoid", "LogSigmoid", "Tanh", "Hardtanh", "Hardswish", "Tanhshrink", "Softshrink",
        )
    },
    "Hardsigmoid": Row(lambda: features(nn.Hardsigmoid()), of_features, "refused", r"^hardsigmoid has no .*replace"),
    "GELU, tanh": Row(lambda: features(nn.GELU("tanh")), of_features),
    "GLU": Row(lambda: features(nn.GLU(), out=3), of_features),
    "Softmax": Row(lambda: features(nn.Softmax(1)), of_features),
    "LogSoftmax": Row(lambda: features(nn.LogSoftmax(1)), of_features),
    "cross_entropy": Row(features, of_features),
    "cross_entropy, label smoothing and class weights": Row(features, of_features, loss=weighted),
    "nll_loss": Row(features, of_features, loss=nll),
    "mse_loss": Row(features, of_features, loss=against_one_hot(F.mse_loss)),
    "l1_loss": Row(features, of_features, loss=against_one_hot(F.l1_loss)),
    "smooth_l1_loss": Row(features, of_features, loss=against_one_hot(F.smooth_l1_loss)),
    "huber_loss": Row(features, of_features, loss=against_one_hot(F.huber_loss)),
    "binary_cross_entropy": Row(features, of_features, loss=against_one_hot(F.binary_cross_entropy, torch.sigmoid)),
    "binary_cross_entropy_with_logits, pos_weight": Row(features, of_features, loss=with_logits),
    "kl_div": Row(features, of_features, loss=kl),
    "ctc_loss": Row(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), of_sequences,
        "refused", r"^ctc_loss has no .*replace", loss=ctc,
    ),
    "multi_margin_loss": Row(
        features, of_features, "refused", r"^multi_margin_loss has no .*replace", loss=multi_margin
    ),
    "triplet_margin_loss": Row(features, of_features, loss=triplet),
}  # fmt: skip
