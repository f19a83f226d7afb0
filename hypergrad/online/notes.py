"""What a step's numbers say of a loop that a user should hear once."""

from __future__ import annotations

from collections.abc import Mapping

from hypergrad.online.loaded_weights import LoadedWeights
from hypergrad.online.other_state import OtherState
from hypergrad.online.written_weights import WrittenWeights

NOT_FINITE = (
    "gradients are finite, but their derivative along the tangents is not (tuner.stats['nonfinite_products']): the loss has an "
    "operation without a second derivative where it was taken, such as a norm or a root at 0 (add a small constant inside the "
    "root, also where a mask hides the entry). Tangents start again from zero there, so hypergradients are mostly missing."
)


def past_the_end(total: int) -> str:
    return (
        f"total_steps={total:,} training steps are done, and training goes on: lr stays at its last, smallest value, and nothing "
        "is tuned any more. Give total_steps the optimizer steps of the whole run, such as epochs * len(train_loader), or "
        "epochs * math.ceil(len(train_loader) / n) where a step is taken every n batches."
    )


def notes(
    read: Mapping[str, list[float]], counts: dict[str, int], of_tangents: Mapping[str, int], other: OtherState
) -> list[str]:
    """Sentences on what was read before a step. Counts what is found.

    Args:
        counts: of the loop.
        of_tangents: the counts of `Tangents`.
    """
    found = [NOT_FINITE] if of_tangents["nonfinite_products"] else []
    said = (WrittenWeights.said(read, counts), other.said(read), LoadedWeights.said(read))
    return [*found, *filter(None, said)]
