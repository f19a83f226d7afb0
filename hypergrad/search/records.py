"""One trial of a study, as a user reads it: made from a trial of Optuna."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypergrad.search.budget import Cost
from hypergrad.search.convert.optuna_spaces import decode
from hypergrad.search.entries import restored
from hypergrad.search.space import Space, Values

STATES = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "interrupted",
    "WAITING": "interrupted",
}


@dataclass(frozen=True)
class Record:
    """One trial.

    Attributes:
        number: from 0.
        state: "complete", "pruned", "failed", or "interrupted": it will be run again when the study goes on.
        params: its values; where hypergradients moved some, those they came to.
        value: the validation loss, or None; of a pruned trial the last one that it reported.
        cost: what it took.
        error: of a failed one the message, the user's own line, and below them the whole traceback.
        notes: what was kept with `trial.note`.
        retries: how often it was run again because its worker died.
    """

    number: int
    state: str
    params: Values
    value: float | None
    cost: Cost
    error: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    retries: int = 0


def record(frozen: Any, space: Space) -> Record:
    """A trial of Optuna as a Record."""
    attrs = frozen.user_attrs
    notes = dict(attrs.get("notes", {}))
    learned = {name: restored(space[name], x) for name, x in notes.get("learned", {}).items() if name in space}
    params = decode(space, frozen.params) | learned
    value = frozen.value if frozen.values else None
    return Record(
        frozen.number,
        STATES[frozen.state.name],
        params,
        value,
        Cost(**attrs.get("cost", {})),
        attrs.get("error"),
        notes,
        attrs.get("retries", 0),
    )


def table_row(each: Record, names: list[str]) -> dict[str, Any]:
    """A row of `Study.table`.

    Args:
        names: of the space's entries.
    """
    cost = {unit: getattr(each.cost, unit) for unit in ("seconds", "epochs", "gradient_evaluations")}
    head: dict[str, Any] = {"trial": each.number, "value": each.value}
    params = {name: each.params.get(name) for name in names}
    notes = {f"note {name}": value for name, value in each.notes.items()}
    error = None if each.error is None else each.error.partition("\n")[0]
    return head | params | {"state": each.state} | cost | notes | {"retries": each.retries, "error": error}
