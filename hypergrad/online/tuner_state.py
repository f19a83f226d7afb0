"""What a tuner needs to go on: its state by policy and by part, with a version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypergrad.online.loaded_weights import said_of_length
from hypergrad.online.loop import OnlineLoop

NO_RECORD = {"best": math.inf, "step": 0, "theta": None, "buffers": [], "last": [], "start": None}
VERSION = 7  # of the layout below; a state of another one is refused


def state_of(loop: OnlineLoop) -> dict[str, Any]:
    """Tensors are not copied."""
    hyper, record, best = loop.hyper, loop.hyper.record, loop.hyper.best
    return {
        "version": VERSION,
        "sizes": list(loop.transition.sizes),
        "weights": loop.reading.loaded.sizes(),
        "total_steps": loop.total,
        "policy names": loop.outer.names,
        "stats": {**loop.counts, **loop.tangents.counts},
        "vector": loop.vector.state_dict(),
        "policies": loop.outer.state_dict(),
        "starts": loop.starts.state_dict(),
        "recovery": loop.recovery.state_dict(),
        "backtracking": None if record is None else record.state_dict(),
        "param groups": loop.writer.state_dict(),
        "tangents": loop.tangents.state_dict(),
        "hyper steps": hyper.state_dict(),
        "progress": hyper.progress.state_dict(),
        "best": None if best is None else best.state_dict(),
        "loop": loop.state_dict(),
    }


def compacted(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the training states that it would go back to: those are then of the steps after it is loaded."""
    starts, judge, record = state["starts"], state["recovery"]["judge"], state["backtracking"]
    return {
        **state,
        "starts": {**starts, "watch": {**starts["watch"], "kept": None}},
        "recovery": {"judge": None if judge is None else {**judge, "good": []}},
        "backtracking": None if record is None else {**record, **NO_RECORD},
    }


def load_state(loop: OnlineLoop, state: Mapping[str, Any]) -> None:
    """Checked before anything is written."""
    _check(loop, state)
    hyper, tangents = loop.hyper, loop.tangents
    tangents.load_counts(state["stats"])
    loop.counts.update({k: v for k, v in state["stats"].items() if k in loop.counts})
    loop.recovery.load_state_dict(state["recovery"])
    loop.starts.load_state_dict(state["starts"])
    loop.outer.load_state_dict(state["policies"])
    loop.vector.load_state_dict(state["vector"])
    loop.writer.load_state_dict(state["param groups"])
    loop.load_state_dict(state["loop"])
    tangents.load_state_dict(state["tangents"])
    hyper.load_state_dict(state["hyper steps"])
    hyper.progress.load_state_dict(state["progress"])
    loop.journal.go_on(loop.t)
    loop.reading.loaded.expect(state["weights"], bool(loop.counts["written_weights"]))
    if hyper.best is not None:
        hyper.best.load_state_dict(state["best"])
    if hyper.record is not None and state["backtracking"] is not None:
        hyper.record.load_state_dict(state["backtracking"])
    loop.follow_phase()  # another one than the state's where total_steps is another
    loop.problem.processes.check_same("the state of a Tuner", (loop.t, loop.vector.value.tolist()))
    if said := said_of_length(state["total_steps"], loop.total):
        loop.journal.note_once(loop.t, said)


def _check(loop: OnlineLoop, state: Mapping[str, Any]) -> None:
    try:
        sizes, names = list(state["sizes"]), list((state.get("vector") or state["coordinates"])["names"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("this is not the state_dict of a hypergrad.Tuner.") from error
    found = state.get("version", 1)
    if found != VERSION:
        raise ValueError(
            f"this state_dict has version {found}, this hypergrad reads version {VERSION}: go on with the release that wrote it, "
            "or begin anew from the present weights."
        )
    mine = state_of(loop)
    theirs = state.get("policy names", mine["policy names"])
    if list(theirs) != mine["policy names"]:
        raise ValueError(
            f"this state_dict was written with the policies {', '.join(theirs)}; this tuner has "
            f"{', '.join(mine['policy names'])}: make it with the same `policies`."
        )
    missing = _missing(mine, state)
    if missing:
        raise ValueError(f"this state_dict is incomplete: it lacks {', '.join(missing)}.")
    if sizes != mine["sizes"]:
        raise ValueError(
            "this state_dict belongs to another model: the optimizer's parameters differ in number or size."
        )
    if names != mine["vector"]["names"]:
        raise ValueError(
            f"this state_dict tunes {names}, this tuner {mine['vector']['names']}: make the tuner with the same `tune`."
        )


# parts whose keys depend on the run
_FREE = {
    ("stats",),
    ("loop", "used", "values"),
    ("tangents", "slots"),
    ("backtracking", "start"),
    ("loop", "cost bound", "plan"),
}


def _missing(mine: Mapping[str, Any], state: Mapping[str, Any], place: tuple[str, ...] = ()) -> list[str]:
    """What a state lacks, at any depth."""
    out = ["/".join([*place, name]) for name in mine if name not in state]
    for name, part in mine.items():
        theirs, inside = state.get(name), (*place, name)
        if isinstance(part, Mapping) and isinstance(theirs, Mapping) and inside not in _FREE:
            out += _missing(part, theirs, inside)
    return out
