"""A GPT over the bytes of a text: tuned runs beside the best of a grid and torch's default, on a GPU.

    python -m experiments.gpt [--minutes 5] [--text FILE] [--device cpu] [--quick]
    python -m experiments.gpt --text FILE --layers 12 --width 768 --heads 12 --context 1024 --vocabulary 50257 --batch 4

The first has half a million weights, the second GPT-2's 124 million (tokens are bytes in both: a larger vocabulary is there for
its size). Without `--text` it reads scikit-learn's descriptions of its data sets, 43 kB, which a large net learns by heart.
Of ten pieces of a text eight train, one validates and one tests. AdamW; attention by torch's scaled_dot_product_attention, or
written out with `--attention written`. Which runs, and what their rows have: real_runs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments import bench_gpt, real_runs
from experiments.arguments import arg, parse
from experiments.real_runs import Batch, Common, Row, Training

WINDOWS = 8  # contexts of a piece
SPLITS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}  # of ten pieces


@dataclass
class Args(Common):
    """Train a GPT tuned, by a tuned run's recipe, by torch's default and over a grid. Finished runs are kept."""

    text: str = arg(None, "any text file (default: scikit-learn's descriptions of its data sets)")
    layers: int = arg(4, "blocks", quick=1)
    width: int = arg(96, "of the blocks", quick=8)
    heads: int = arg(4, "of attention", quick=2)
    context: int = arg(64, "bytes that it sees", quick=8)
    vocabulary: int = arg(256, "tokens in the table, 256 at least")
    attention: str = arg("fused", "fused, or written: out of matrix products")
    batch: int = arg(32, "sequences of a training batch", quick=4)
    held_out: int = arg(0, "sequences of the validation set, and as many of the test; 0: all", quick=16)
    grid_lr: tuple = arg((1e-3, 3e-3, 3e-4, 1e-2, 1e-4), "learning rates of the grid, in their order", quick=(1e-3,))
    grid_wd: tuple = arg((0.1, 0.01, 1.0), "weight decays of the grid, in their order", quick=(0.1, 0.01))
    out: str = arg("runs/gpt", "folder of finished runs, result and logs", quick="runs/gpt_quick")


@cache
def codes(text: str | None) -> Tensor:
    """The bytes of a text file [n]."""
    if text is None:
        from experiments.workloads.data import text_codes  # here: it needs scikit-learn

        return text_codes().to(torch.uint8)
    return torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8)


@cache
def pieces(text: str | None, context: int, device: str) -> dict[str, Tensor]:
    """Training, validation and test pieces of WINDOWS contexts and one byte, [n, bytes], on the device."""
    whole, size = codes(text), WINDOWS * context + 1
    if len(whole) < 10 * size:
        raise SystemExit(
            f"--text has {len(whole):,} bytes, and a context of {context} needs {10 * size:,} at least: pass a longer text, or a "
            "smaller --context"
        )
    cut = whole[: len(whole) // size * size].view(-1, size).to(device)
    which = torch.arange(len(cut), device=device) % 10
    return {name: cut[(which >= of[0]) & (which <= of[-1])] for name, of in SPLITS.items()}


def windows(cut: Tensor, at: Tensor, offset: Tensor, context: int) -> Batch:
    """Sequences [n, context] of the pieces `at`, from `offset` on, and their next bytes [n · context]."""
    columns = offset[:, None] + torch.arange(context + 1, device=cut.device)
    found = cut[at[:, None], columns].long()
    return found[:, :-1].contiguous(), found[:, 1:].flatten()


def build(args: Args) -> Training:
    cut = pieces(args.text, args.context, args.device)
    torch.manual_seed(args.seed)
    size = bench_gpt.Size(
        args.layers, args.width, args.heads, args.context, args.vocabulary, args.batch, args.attention == "fused"
    )
    model = bench_gpt.GPT(size).to(args.device)

    def loss(batch: Batch) -> Tensor:
        with real_runs.autocast(args):
            return cross_entropy(model(batch[0]), batch[1])

    def batches() -> Iterator[Batch]:
        draws, own = torch.Generator().manual_seed(args.seed), cut["train"]
        for _ in range(args.steps):
            at = torch.randint(len(own), (args.batch,), generator=draws)
            offset = torch.randint(own.shape[1] - args.context, (args.batch,), generator=draws)
            yield windows(own, at.to(args.device), offset.to(args.device), args.context)

    def val_loss() -> Tensor:
        own, n = cut["val"], args.val_batch or args.batch
        at = torch.randint(len(own), (n,), device=args.device)
        offset = torch.randint(own.shape[1] - args.context, (n,), device=args.device)
        return loss(windows(own, at, offset, args.context))

    def chunks(split: str) -> Iterator[Batch]:
        """Each byte of the set's pieces once, as what comes next."""
        own = cut[split]
        at = torch.arange(len(own), device=args.device).repeat_interleave(WINDOWS)
        offset = (torch.arange(WINDOWS, device=args.device) * args.context).repeat(len(own))
        n = args.held_out or len(at)
        for some, first in zip(at[:n].split(args.batch), offset[:n].split(args.batch), strict=True):
            yield windows(own, some, first, args.context)

    summed = partial(cross_entropy, reduction="sum")
    evaluate = real_runs.evaluator(model, chunks, summed, args)
    return Training(model, torch.optim.AdamW, batches(), loss, val_loss, evaluate)


def main(args: Args) -> list[Row]:
    if args.attention not in ("fused", "written"):
        raise SystemExit(f"--attention: fused or written, got {args.attention}")
    if args.vocabulary < 256 or args.width % args.heads:
        raise SystemExit("--vocabulary is at least 256, and --width a multiple of --heads")
    if args.text is not None and not Path(args.text).is_file():
        raise SystemExit(f"--text: there is no file {args.text}")
    real_runs.check(args)
    name = "scikit-learn's descriptions" if args.text is None else Path(args.text).name
    return real_runs.main(args, "gpt", f"{name}, {len(codes(args.text)):,} bytes", build)


if __name__ == "__main__":
    main(parse(Args))
