"""Checks one after the other, each a row of a result file that is rewritten as rows come."""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
LAST_LINES = 8  # of a traceback


class Place(NamedTuple):
    """Where checks run, and how large they are."""

    device: str
    quick: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


class NotRun(Exception):
    """A check does not apply here; the message says why."""


Check = Callable[[Place], Row]  # numbers and a line "detail"; raises where something is wrong


def run(checks: Mapping[str, Check], place: Place, seconds: float, save: Callable[[list[Row]], None]) -> list[Row]:
    """Run checks until the time is up; those still to come are rows too. `save` gets all rows so far after each."""
    rows: list[Row] = []
    start = time.perf_counter()
    for name, check in checks.items():
        began = time.perf_counter()
        if began - start >= seconds:
            found: Row = {"passed": None, "detail": "not run: time was up"}
        else:
            found = outcome(check, place)
            free(place)
        took = round(time.perf_counter() - began, 2)
        rows.append(
            {"check": name, "passed": found.pop("passed"), "seconds": took, "detail": found.pop("detail"), **found}
        )
        word = {True: "passed", False: "FAILED", None: "      "}[rows[-1]["passed"]]
        print(f"{word}  {name} ({took:.1f} s): {rows[-1]['detail']}", flush=True)
        save(rows)
    return rows


def outcome(check: Check, place: Place) -> Row:
    """What a check found, with `passed`. torch's settings are put back after it."""
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    try:
        return {"passed": True, **check(place)}
    except NotRun as reason:
        return {"passed": None, "detail": f"not run: {reason}"}
    except Exception as error:
        return {"passed": False, **failure(error)}
    finally:
        torch.set_default_dtype(settings[0])
        torch.use_deterministic_algorithms(settings[1])


def free(place: Place) -> None:
    """Give back the device memory of a check, which cycles of references and the frames of an error may hold."""
    if place.cuda and torch.cuda.memory_reserved() > 2**30:
        gc.collect()
        torch.cuda.empty_cache()


def failure(error: Exception) -> Row:
    """Type and message of an error, and the last lines of its traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    lines = [line for line in lines if line.strip(" ^~")][-LAST_LINES:]
    return {
        "detail": without_folders(f"{type(error).__name__}: {error}"),
        "traceback": without_folders("\n".join(lines)),
    }


def without_folders(text: str) -> str:
    """File names relative to the checkout or to the folder of packages; of other absolute ones the last part."""
    text = text.replace(f"{ROOT}/", "")
    text = re.sub(r"/(?:[^\s\"'/:]+/)*(?:site|dist)-packages/", "", text)
    return re.sub(r"(?<![\w.:/])/(?:[\w.+@-]+/)+", "", text)
