"""Hyperopt's TPE, Bergstra et al., NeurIPS 2011, by its own authors.

Hyperopt keeps its trials in documents: label → value, with the index for a choice. They are made anew from the study's trials
for every new trial; so a study resumes, and runs on a cluster, as with any other sampler. A trial that runs or failed
has no loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypergrad.search.convert import to_hyperopt
from hypergrad.search.convert.hyperopt_spaces import flat, labels_of
from hypergrad.search.convert.optuna_spaces import decode, distribution, encode, key
from hypergrad.search.extras import need
from hypergrad.search.objective import seed_of
from hypergrad.search.space import Space, Values
from hypergrad.search.storage import sign_of
from hypergrad.search.strategies.base import Strategy


class Hyperopt(Strategy):
    """Options are those of `hyperopt.tpe.suggest`: n_startup_jobs, n_EI_candidates, gamma, prior_weight."""

    takes = ("n_startup_jobs", "n_EI_candidates", "gamma", "prior_weight")

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        self.expressions = to_hyperopt(space)

    def sampler(self, number: int) -> Any:
        return _sampler(self, number)

    def next(self, finished: list[tuple[Values, float]], seed: int) -> Values:
        """The values that TPE proposes after trials with these values and losses."""
        base = need("hyperopt.base", "strategy 'hyperopt'")
        tpe = need("hyperopt.tpe", "strategy 'hyperopt'")
        domain = base.Domain(None, self.expressions, pass_expr_memo_ctrl=False)
        trials = base.Trials()
        trials.insert_trial_docs([self._document(i, domain, *each) for i, each in enumerate(finished)])
        trials.refresh()
        (new,) = tpe.suggest([len(finished)], domain, trials, seed, verbose=False, **self.options)
        chosen = {label: plain[0] for label, plain in new["misc"]["vals"].items() if plain}
        point = need("hyperopt", "strategy 'hyperopt'").space_eval(self.expressions, chosen)
        values = flat(point, self.space)
        return {name: self._inside(name, values[name]) for name in self.space.active(values)}

    def _inside(self, name: str, value: Any) -> Any:
        """Rounding of exp and the logistic function may leave a value outside by its last digit."""
        entry = self.space[name]
        return min(max(value, entry.low), entry.high) if hasattr(entry, "low") else value  # type: ignore[attr-defined]

    def _document(self, tid: int, domain: Any, values: Values, loss: float) -> dict[str, Any]:
        known = labels_of(self.space, values)
        vals = {label: [known[label]] if label in known else [] for label in domain.params}
        idxs = {label: [tid] if label in known else [] for label in domain.params}
        misc = {"tid": tid, "cmd": domain.cmd, "workdir": None, "idxs": idxs, "vals": vals}
        result = {"status": "ok", "loss": loss} if math.isfinite(loss) else {"status": "fail"}
        head = {"state": 2, "tid": tid, "spec": None, "result": result, "misc": misc}  # 2: hyperopt.JOB_STATE_DONE
        return head | dict.fromkeys(("exp_key", "owner", "book_time", "refresh_time")) | {"version": 0}


def _sampler(strategy: Hyperopt, number: int) -> Any:
    """A sampler of Optuna whose values are those that Hyperopt proposes."""
    optuna = need("optuna", "a search")
    space, seed = strategy.space, seed_of(strategy.seed, number)

    class HyperoptSampler(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {key(name, entry): distribution(entry) for name, entry in space.items()}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            done = [x for x in study.get_trials(deepcopy=False) if x.state.is_finished() and x.params]
            sign = sign_of(study)
            finished = [(decode(space, x.params), math.inf if x.value is None else sign * x.value) for x in done]
            return encode(space, strategy.next(finished, seed))

        def sample_independent(self, study: Any, trial: Any, name: str, d: Any) -> Any:
            return optuna.samplers.RandomSampler(seed=seed).sample_independent(study, trial, name, d)

    return HyperoptSampler()
