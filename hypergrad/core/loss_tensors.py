"""`hypers`: what a loss, a schedule or the validation loss reads besides parameters and batches.

A tensor or a net of the user's own is differentiated in as it is, not as a copy: so it may be read as `hypers[name]`, from a
closure, or both, and the validation loss that reads it has its direct term.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad.core.hyperparameters import Hyperparameter, as_hyperparameter


class LossTensors:
    """Tensors and nets by name.

    Args:
        hypers: name → tensor, net, number, or Hyperparameter with a tensor or number as its start.
        dtype: of the tensors that are made of numbers; None: torch's default.

    Attributes:
        leaves: name → tensor. Of a net: "name.parameter" → each parameter that requires a gradient.
        given: name → tensor or net: what a loss takes as its argument `hypers`.
        specs: name in `leaves` → Hyperparameter; of kind "free", if not said otherwise.
        nets: the nets.
        own: names in `given` of what is the user's own, rather than made of a number here.

    Raises:
        ValueError: a start that is missing or not finite, a net without parameters, elements or tensors that share memory.
    """

    def __init__(self, hypers: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None):
        self.leaves: dict[str, Tensor] = {}
        self.given: dict[str, Any] = {}
        self.specs: dict[str, Hyperparameter] = {}
        self.nets: list[nn.Module] = []
        self.own: set[str] = set()
        self._parts: dict[str, list[str]] = {}  # name in `given` → its names in `leaves`
        for name, value in (hypers or {}).items():
            if isinstance(value, nn.Module):
                self._add_net(name, value)
            else:
                known = value is None or isinstance(value, (Hyperparameter, int, float, str, Tensor))
                spec = as_hyperparameter(name, value if known else torch.as_tensor(value), in_loss=True)
                self._add(name, spec, dtype)
        self._check_memory()

    def _add(self, name: str, spec: Hyperparameter, dtype: torch.dtype | None) -> None:
        x = spec.start
        if x is None:
            raise ValueError(f"hypers[{name!r}] needs a start: hypergrad.Hyperparameter(start=...).")
        if isinstance(x, Tensor) and x.is_floating_point() and not x.is_inference():
            self.own.add(name)
        else:
            x = torch.as_tensor(x, dtype=dtype).detach().clone()
            x = (x if x.is_floating_point() else x.to(dtype or torch.get_default_dtype())).requires_grad_()
        self._check_finite(name, x)
        self.leaves[name] = self.given[name] = x
        self.specs[name], self._parts[name] = spec, [name]

    def _add_net(self, name: str, net: nn.Module) -> None:
        parts = {f"{name}.{key}": p for key, p in net.named_parameters() if p.requires_grad}
        if not parts:
            raise ValueError(f"hypers[{name!r}] is a net with no parameter that requires a gradient.")
        for key, p in parts.items():
            self._check_finite(key, p)
        self.leaves |= parts
        self.specs |= {key: Hyperparameter(p, kind="free") for key, p in parts.items()}
        self.given[name], self._parts[name] = net, list(parts)
        self.nets.append(net)
        self.own.add(name)

    @staticmethod
    def _check_finite(name: str, x: Tensor) -> None:
        if not bool(torch.isfinite(x.detach()).all()):
            raise ValueError(f"hypers[{name!r}] is not finite.")

    def _check_memory(self) -> None:
        """Every number has a place of its own, so that it can be moved by itself."""
        seen: dict[int, str] = {}
        for name, x in self.leaves.items():
            if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
                raise ValueError(
                    f"hypers[{name!r}] is expanded: several of its elements are one number in memory. Pass its .clone()."
                )
            if not x.numel():
                continue
            other = seen.setdefault(x.data_ptr(), name)
            if other != name:
                raise ValueError(
                    f"hypers[{name!r}] and hypers[{other!r}] are the same tensor: pass it once, or a .clone() of it where these "
                    "are two hyperparameters."
                )

    def check_apart(self, params: Iterable[Tensor]) -> None:
        """Raise where the optimizer trains one of these."""
        trained = {id(p) for p in params}
        for name, x in self.leaves.items():
            if id(x) in trained:
                raise ValueError(
                    f"hypers[{name!r}] is trained by the optimizer: give the optimizer the other parameters alone, so that this "
                    "one is a hyperparameter."
                )

    def check_movable(self) -> None:
        """Raise where a tensor cannot be moved: it would be computed again from others."""
        for name, x in self.leaves.items():
            if not x.is_leaf:
                raise ValueError(
                    f"hypers[{name!r}] is computed from other tensors ({x.grad_fn.name()}): pass what it is computed from, or a "  # type: ignore[union-attr]
                    ".detach().clone() that the loss reads."
                )

    def expanded(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names with a net's replaced by those of its parameters."""
        return tuple(part for name in names for part in self._parts.get(name, [name]))

    def unread(self, names: Collection[str], read: Collection[str]) -> list[str]:
        """Of these names in `leaves`: tensors that are not among those `read`, and nets no parameter of which is."""
        wanted = {name for name in names if name in self.leaves}
        groups = [(name, parts) for name, parts in self._parts.items() if wanted & set(parts)]
        return [name for name, parts in groups if not set(parts) & set(read)]

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Within this context all require a gradient; afterwards, those that did before."""
        put_back = self.require_gradients()
        try:
            yield
        finally:
            set_free(put_back)

    def require_gradients(self) -> list[Tensor]:
        """Let all require a gradient. Returns those that did not."""
        changed = [x for x in self.leaves.values() if not x.requires_grad]
        for x in changed:
            x.requires_grad_()
        return changed


def set_free(tensors: Sequence[Tensor]) -> None:
    """Let leaves require no gradient."""
    for x in tensors:
        x.requires_grad_(False)


def unread_error(names: Sequence[str]) -> ValueError:
    listed = ", ".join(f"hypers[{name!r}]" for name in names)
    return ValueError(
        f"nothing reads {listed}: neither the training loss, nor a schedule, nor val_loss depends on it. Let the loss read it: "
        "as the argument of loss(model, batch, hypers), as tuner.hypers[...], or as the very tensor that was passed. A net that "
        "the loss calls is passed itself, hypers={'net': net}, not as copies of its parameters. Where only later steps read it, "
        "let the others add 0 times its sum to the loss. Or leave it out."
    )
