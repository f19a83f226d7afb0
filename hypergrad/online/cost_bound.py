"""The bound on the price of a run: measured, made a plan, and kept count of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hypergrad.core.processes import Processes
from hypergrad.logging import Journal
from hypergrad.online.calibration import BETWEEN, SHORT, Calibration, Measured
from hypergrad.online.plan import MOST_PRODUCT, PERIOD, Plan, Spending, as_plan, odd, rounded_up
from hypergrad.online.validation_noise import DRAWS

# What these do at a given lr/(1 − momentum), or in Adam at a given lr, is to say how late a gradient acts: with gradients taken
# for constants, as in steps without a product, sooner is always better. All else that they do passes through curvature.
DELAYS = frozenset({"momentum", "betas"})
SMALL = 0.05  # the share of what may be spent that second draws may take


class CostBound:
    """Holds the plan, once there is one.

    Args:
        cost: the bound; None: none, or that of the plan.
        plan: one that was made before; it rules from the step on after which it would be made. None: it is made there.
        every: steps between validation losses that were asked for.
        fixed: they are not to be made rarer.
        total: steps of the run; None: not known.
        mean: how many numbers are tuned at once, and in which share of the run.
    """

    def __init__(
        self, cost: float | None, plan: Plan | None, every: int, fixed: bool, total: int | None,
        mean: tuple[float, float], calibration: Calibration, journal: Journal, processes: Processes,
    ):  # fmt: skip
        self.cost, self.every, self.fixed, self.total, self.mean = cost, every, fixed, total, mean
        self.calibration, self.journal, self.processes = calibration, journal, processes
        self.given = plan
        self.capped = 0  # steps in which tangents had met the cap when the present phase began
        self.spending = Spending(None if calibration.active else plan)

    @property
    def plan(self) -> Plan | None:
        """That which rules; None: none does yet."""
        return self.spending.plan

    def reads(self, t: int, resting: bool, searching: bool) -> bool:
        """Whether the validation loss is read after t steps: not while lr's start is found, where there is to be a plan.

        Args:
            resting: nothing is tuned.
            searching: lr's warm start is under way.
        """
        if self.plan is None:
            return t % self.every == 0 and not (searching and self.calibration.active)
        return t % (self.plan.resting if resting else self.plan.every_at(t, self.total)) == 0

    def averages_every(self, tuned: bool) -> int:
        """Steps between those whose weights go into the running average: with their tangents, where there are any."""
        return 1 if tuned else odd(self.every)

    def affords_second_draws(self) -> bool:
        """Whether second draws of the validation loss (validation_noise.py) are a small part of what may be spent."""
        plan = self.plan
        if plan is None:
            return not self.calibration.active
        return DRAWS * plan.validation <= SMALL * plan.allowance(PERIOD if self.total is None else self.total)

    def begin_phase(self, capped: int) -> None:
        """Other numbers are tuned from here on. capped: steps so far in which tangents met the cap (tangent_cap.py)."""
        self.capped = capped

    def products_every(self, searching: bool, names: Collection[str], capped: int) -> int:
        """Products are formed in one step of so many, while numbers are tuned.

        In every one where one of DELAYS is tuned, and for the rest of a phase without lr in which tangents met the cap: what
        bounds them is curvature, and at the edge of stability a product in one step of a few does not. (lr is moved down there.)

        Args:
            searching: lr's warm start is under way.
            names: of what is tuned now.
            capped: as of `begin_phase`.
        """
        if searching or self.plan is None:
            self.capped = capped
            return 1 if searching or not self.calibration.timing else BETWEEN
        unbounded = capped > self.capped and "lr" not in names
        return 1 if unbounded or not DELAYS.isdisjoint(names) else self.plan.stride

    def step_done(self, t: int, k: int, formed: bool, searching: bool) -> None:
        """t steps are done, the last with k numbers tuned.

        Args:
            formed: with products.
            searching: lr's warm start is under way.
        """
        self.spending.step(t - 1, k, formed, self.total)
        self.calibration.step_done(t, k, formed, searching)
        if not (self.calibration.active and self.calibration.complete):
            return
        plan, found = self.given, None
        if plan is not None:
            self.calibration.stop()
        else:
            found = self.calibration.result(k, self.processes)
            if found is None:
                self.journal.note(t, "what tuning costs could not be measured: it goes on without a bound.")
                return
            assert self.cost is not None  # nothing is measured without one
            plan = self._plan_for(self.cost, found, t)
        self.spending.plan = plan
        self.spending.spent = plan.price(k, 1.0) * t  # the run has just begun
        self.journal.note(t, plan.sentence(), warn=False)
        if found is not None and (found.seconds < SHORT or found.product > MOST_PRODUCT):
            why = (
                f"a plain step takes {1000 * found.seconds:.2g} ms here, most of which is Python's own time"
                if found.seconds < SHORT
                else f"a product takes {found.product:.2g} times what a plain step does here"
            )
            more = f"{why}: the run will take more than {plan.cost:g} times a plain one's seconds."
            self.journal.note(t, more, warn=False)
        if plan.allowance(1) == 0:
            self.journal.note(
                t,
                f"cost={plan.cost:g} cannot be kept: reading the validation loss once in {plan.resting} steps costs more by "
                "itself. Nothing is tuned any more. Give val_loss a smaller batch, or read it more rarely (every=...).",
            )

    def _plan_for(self, cost: float, found: Measured, t: int) -> Plan:
        """t: steps done."""
        tangents = found.tangents if found.seconds < SHORT else rounded_up(found.tangents)
        return Plan.made(
            cost, found.product, found.validation, self.every, self.fixed, *self.mean, tangents, self.total, t
        )

    def state_dict(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "plan": None if plan is None else plan.state_dict(),
            "spent": self.spending.spent,
            "capped": self.capped,
            "calibration": self.calibration.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.spending = Spending(as_plan(state["plan"]), float(state["spent"]))
        self.capped = int(state["capped"])
        self.calibration.load_state_dict(state["calibration"])
