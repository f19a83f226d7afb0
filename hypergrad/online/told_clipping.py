"""Whether a loop that was told to clip does: `clip_norm` and `clip_value` say what the loop does, and clip nothing themselves."""

from __future__ import annotations

from hypergrad.logging import Journal
from hypergrad.online.gradient_changes import Comparison

PATIENCE = 20  # steps with gradients above the threshold, none of which were clipped
_CALLS = {"clip_norm": "clip_grad_norm_", "clip_value": "clip_grad_value_"}


class ToldClipping:
    """Says once that gradients above the threshold come to the step unclipped, where none was clipped so far."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.unclipped, self.clips = 0, False

    def note(self, t: int, comparison: Comparison) -> None:
        """The gradients of step t are known."""
        if comparison.clipped is None or self.clips:
            return
        self.clips = comparison.clipped
        self.unclipped += 1
        if self.clips or self.unclipped < PATIENCE:
            return
        name, at = comparison.clip, f"{comparison.threshold:g}"
        assert name is not None
        what = "of norm" if name == "clip_norm" else "with elements"
        self.journal.note_once(
            t,
            f"{name}={at} was given, but gradients {what} above {at} came to optimizer.step() unclipped in all {PATIENCE} steps "
            f"that had such: the tuner clips nothing, {name} tells it what the loop does. Call torch.nn.utils.{_CALLS[name]}("
            f"model.parameters(), {at}) between tuner.backward(loss) and optimizer.step(), after scaler.unscale_(optimizer) if "
            f"there is a GradScaler, or leave {name} out. In a loop that clips from a later step on nothing is wrong.",
        )
