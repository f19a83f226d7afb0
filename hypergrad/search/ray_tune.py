"""An objective of this search as a trainable of Ray Tune, whose schedulers stop it, pause it, or copy its weights."""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypergrad.search.entries import restored
from hypergrad.search.extras import need
from hypergrad.search.failures import explained
from hypergrad.search.objective import (
    Objective,
    Trial,
    WrongType,
    as_number,
    as_sign,
    call_objective,
    seed_of,
    seeded,
    takes_trial,
)
from hypergrad.search.space import Space
from hypergrad.search.stored_data import load_state, save_state
from hypergrad.search.training import is_run, train
from hypergrad.search.values import plain

NEEDED_BY = "a trainable of Ray Tune"
FILE = "trial.pt"  # in a checkpoint of Ray: the objective's state, and how far it had come


class TuneTrial(Trial):
    """A trial inside Ray Tune: each report goes to Tune's scheduler, with the last state given to `checkpoint`."""

    def __init__(self, number: int, params: dict[str, Any], seed: int, must_restore: bool, sign: float):
        super().__init__(number, params, seed, sign=sign)
        self.tune, self.must_restore = need("ray.tune", NEEDED_BY), must_restore
        self.restored = None
        if (saved := self.tune.get_checkpoint()) is not None:
            with saved.as_directory() as folder:
                known = load_state(Path(folder) / FILE)
            self.restored, self.curve = known["state"], known["curve"]
            self.seed = seed_of(seed, len(self.curve))  # other random numbers than those of its first steps
            self._epochs = float(self.curve[-1][0])
        self.reported, self.restore_called = (self._epochs, 0.0), False
        self.state: Any = None

    def checkpoint(self, state: Any) -> None:
        self.state = state

    def restore(self) -> Any:
        self.restore_called = True
        return self.restored

    def record(self, value: Any, step: int) -> None:
        number = as_number(value, "trial.report was given")
        self.curve.append((step, number))
        if self.restored is not None and not self.restore_called:
            raise WrongType(
                "this trial goes on from a checkpoint, but the objective did not call trial.restore(): begin with "
                "state = trial.restore(), and load it unless it is None."
            )
        if self.state is None:
            if self.must_restore:
                raise WrongType(
                    "strategy 'pbt' copies training from trial to trial, but the objective keeps none of it: call "
                    "trial.checkpoint(state) before each trial.report, and begin with state = trial.restore()."
                )
            self.tune.report(self.metrics(number, step))
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state({"state": self.state, "curve": self.curve}, Path(folder) / FILE)
            saved = self.tune.Checkpoint.from_directory(folder)
            self.tune.report(self.metrics(number, step), checkpoint=saved)

    def metrics(self, value: float, step: int) -> dict[str, Any]:
        """The metrics of a report to Tune: the loss, of a score minus it; costs are those since the last report."""
        (epochs, gradients), self.reported = self.reported, (float(step), self._gradients)
        more = {"epochs_more": step - epochs, "gradients_more": self._gradients - gradients}
        score = {} if self.sign > 0 else {"score": value}
        return {"loss": self.sign * value, "epoch": step, "notes": dict(self.notes)} | score | more


def ray_trainable(
    objective: Objective, seed: int = 0, direction: str = "minimize"
) -> Callable[[Mapping[str, Any]], None]:
    """An objective as the function trainable that `ray.tune.Tuner` takes, over `param_space=to_ray(space)`.

    Each `trial.report(value, step)` is a result with "loss" (to be minimised) and "epoch", which any scheduler of Ray Tune may
    act on (ASHA, median stopping, population-based training); what `trial.checkpoint(state)` was given before goes with it as a
    checkpoint of Ray, and comes back from `trial.restore()` where Tune goes on from one. The value returned is the loss of the
    last result.

    Args:
        objective: as `optimize` takes it. A `Run` is trained, and reports ten times on its way.
        seed: of the study; every trial has its own, from Tune's number for it.
        direction: "minimize", or "maximize" where the objective gives a score: results have it as "score", "loss" is minus it.

    Raises:
        TypeError: an objective that is none.
        ValueError: another direction.
        ImportError: Ray is missing; the message has the line for pip.
    """
    takes_trial(objective)
    need("ray.tune", NEEDED_BY)
    made = Trainable(objective, seed, for_pbt=False, sign=as_sign(direction))

    def trainable(config: Mapping[str, Any]) -> None:
        made(config)

    return trainable


class Trainable:
    """Called by Ray on a worker, once for each time that a trial begins or goes on.

    Args:
        for_pbt: report failures as results and insist on checkpoints, as strategy "pbt" needs; else failures are raised.
        numbers: of the study's trials, in Tune's order; None: Tune's own.
        space: whose choices Tune has the names of; None: it has the values.
        sign: of the study, as of `Trial`.
    """

    def __init__(
        self,
        objective: Objective,
        seed: int,
        for_pbt: bool,
        numbers: list[int] | None = None,
        space: Space | None = None,
        sign: float = 1.0,
    ):
        self.sign = sign
        self.objective, self.seed, self.for_pbt, self.numbers, self.space = objective, seed, for_pbt, numbers, space

    def __call__(self, config: Mapping[str, Any]) -> None:
        tune = need("ray.tune", NEEDED_BY)
        params = {name: plain(value) for name, value in config.items()}
        if self.space is not None:
            params = {name: restored(self.space[name], value) for name, value in params.items()}
        number = self._number(tune.get_context().get_trial_id())
        if self.for_pbt and (folder := os.environ.get("TUNE_ORIG_WORKING_DIR")):
            os.chdir(folder)  # relative paths mean the same as with every other strategy
        last: dict[str, Any] = {"done": True}
        try:
            trial = TuneTrial(number, params, seed_of(self.seed, number), self.for_pbt, self.sign)
            with seeded(trial.seed):
                result = call_objective(self.objective, trial)
                value = as_number(train(result, trial) if is_run(result) else result, "the objective returned")
            if math.isnan(value) or value == -self.sign * math.inf:
                raise ValueError(f"the objective returned {value}.")
            last |= trial.metrics(value, int(trial.reported[0]))
        except Exception as error:
            if not self.for_pbt:
                raise
            wrong = str(error) if isinstance(error, WrongType) else ""
            last |= {"loss": math.inf, "error": explained(error), "wrong": wrong}
        tune.report(last)

    def _number(self, trial_id: str) -> int:
        if self.numbers is None:
            return number_of(trial_id)
        return self.numbers[0 if len(self.numbers) == 1 else number_of(trial_id)]


def number_of(trial_id: str) -> int:
    """The number of a trial of Tune: the end of an id such as "9a3f1_00007", or a number made of any other id."""
    end = trial_id.rsplit("_", 1)[-1]
    return int(end) if end.isdigit() and "_" in trial_id else zlib.crc32(trial_id.encode())
