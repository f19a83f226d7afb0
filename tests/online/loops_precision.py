"""Loops in precisions below float64: they train as they would; their differences are noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.online.live_loops import Backward
from tests.online.loop_rows import AS_PLAIN, Live, N, Row
from tests.online.loops_steps import batches, ce, net, plain_step, sgd


def amp(dtype: torch.dtype, scaled: bool = False) -> Callable[[], Live]:
    """Autocast, in float32."""

    def build() -> Live:
        model = net().float()
        opt = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        *training, held_out = [(x.float(), y) for x, y in batches(N + 1)]

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype):
                return ce(model, batch)

        def train(backward: Backward) -> None:
            for batch in training:
                opt.zero_grad()
                if scaler is None:
                    backward(loss(batch))
                    opt.step()
                    continue
                backward(scaler.scale(loss(batch)))
                scaler.step(opt)
                scaler.update()

        return Live(model, [opt], train, lambda: loss(held_out), scaler)

    return build


def cast(dtype: torch.dtype) -> Callable[[], Live]:
    """Everything in a low precision."""

    def build() -> Live:
        model = net().to(dtype)
        opt = sgd(model)
        *training, held_out = [(x.to(dtype), y) for x, y in batches(N + 1)]

        def train(backward: Backward) -> None:
            for t, batch in enumerate(training):
                plain_step(model, opt, backward, t, batch)

        return Live(model, [opt], train, lambda: ce(model, held_out))

    return build


PRECISIONS: dict[str, Row] = {
    "autocast to bfloat16": Row(amp(torch.bfloat16), AS_PLAIN),
    "autocast to float16 with GradScaler": Row(amp(torch.float16, True), AS_PLAIN, "`scaler=`"),
    "model.bfloat16()": Row(cast(torch.bfloat16), AS_PLAIN),
    "model.half()": Row(cast(torch.float16), AS_PLAIN),
    "float32": Row(cast(torch.float32), AS_PLAIN),
}  # fmt: skip
