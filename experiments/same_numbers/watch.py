"""A record of the tuners that an experiment makes by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import hypergrad
from experiments.same_numbers.record import Recorder, of_tuner, weights

EVERY = 10  # steps between digests of the weights


@contextmanager
def watched_tuners(record: Recorder) -> Iterator[None]:
    """A tuner that is made as `hypergrad.Tuner(…)` meanwhile adds to the record after every step of its last optimizer.

    Raises:
        RuntimeError: none was made, so that nothing would be compared.
    """
    made: list[Any] = []
    make = hypergrad.Tuner

    def watched(model: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        tuner = make(model, optimizer, *args, **options)
        made.append(tuner)
        steps = 0

        def after_step(*_: Any) -> None:
            nonlocal steps
            steps += 1
            record.add(of_tuner(tuner) | ({"weights": weights(model)} if steps % EVERY == 0 else {}))

        (optimizer[-1] if isinstance(optimizer, Sequence) else optimizer).register_step_post_hook(after_step)
        return tuner

    with mock.patch.object(hypergrad, "Tuner", watched):
        yield
    if not made:
        raise RuntimeError("the experiment made no tuner as hypergrad.Tuner(…)")
