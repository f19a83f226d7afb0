"""`Population`: many models of one shape, trained and tuned together on one device.

All weights are one matrix Θ [P, n], a row a member. The loss of all members is one `vmap` of the user's code over rows:

    ℓ(Θ) = Σᵢ ℓᵢ(θᵢ),   ∂ℓ/∂Θ has row i ∇ℓᵢ(θᵢ),   ∂⟨∂ℓ/∂Θ, Z⟩/∂Θ has row i ∇²ℓᵢ(θᵢ) zᵢ,

as no member sees another. One backward pass gives all gradients, one more all Hessian products. The optimizer's algebra is
that of `optimizers/rules/`, a member at a time: its rules take one number each of lr, weight decay, ….
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hypergrad.core.float64 import on_host
from hypergrad.core.hyperparameters import KIND_OF, Hyperparameter
from hypergrad.online.policies.adam_on_phi import ADAM
from hypergrad.optimizers.binding import Binding
from hypergrad.optimizers.rule import Tensors


class _Call(nn.Module):
    """A loss of a model as a module, so that functional_call can give it weights."""

    def __init__(self, model: nn.Module, f: Callable[..., Tensor]):
        super().__init__()
        self.model, self.f = model, f

    def forward(self, *args: Any) -> Tensor:
        return self.f(self.model, *args)


class Population:
    r"""Train and tune P models of one architecture together; each as it would be alone.

    Every step carries the tangents Zᵢ = dθᵢ/dφᵢ of each member's own numbers φᵢ = log lr, log weight decay, … along (forward
    mode); every `every` steps dLᵢ/dφᵢ = ⟨∇Lᵢ, Zᵢ⟩ is formed and φᵢ takes a step of Adam (`online/policies/adam_on_phi.py`; for
    one model Clarke et al. 2022, arXiv 2110.10461).
    This is a smaller tuner than `hypergrad.Tuner`: no warm start, schedule or guard.

    Args:
        models: P modules that differ in their weights alone.
        optimizers: one live optimizer a model: one param group of SGD, AdamW, RMSprop or another elementwise rule of
            `hypergrad/optimizers/rules`, of the same flags; lr, weight decay, … may differ.
        loss: `loss(model, batch)` → scalar.
        val_loss: `val_loss(model)` → scalar; needed where something is tuned.
        tune: names in param_groups whose value is a number above 0; () trains only.
        every: steps between hyperparameter steps; None: hypergradients only where `hypergradients()` is called.
        hyper_lr: step of Adam on φ.

    Attributes:
        values: name → tensor [P].

    Raises:
        ValueError: models or optimizers that do not match, a number to be tuned that is 0 or missing.
        NotImplementedError: buffers (BatchNorm's running statistics), several param groups, rules that are not elementwise, and
            code that vmap cannot take, such as `if` on a tensor's value.

    Dropout, and whatever else draws random numbers in a loss, draws others for each member.
    `close()` writes weights, optimizer state and values back.

    Example:
        Gradient descent on θ²/2 from θ = 2 at lr 0.1 and 0.5: dL/dlr = −2 · 2 (1 − lr) = −3.6 and −2.

        >>> models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> for model in models:
        ...     _ = nn.init.constant_(model.weight, 2.0)
        >>> sgd = [torch.optim.SGD(m.parameters(), lr=lr) for m, lr in zip(models, (0.1, 0.5))]
        >>> half_square = lambda model, batch=None: (model.weight**2).sum() / 2
        >>> population = Population(models, sgd, half_square, half_square, tune=("lr",), every=None)
        >>> _ = population.step(torch.zeros(1))
        >>> [round(x, 4) for x in population.hypergradients()["lr"].tolist()]
        [-3.6, -2.0]
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[[nn.Module, Any], Tensor],
        val_loss: Callable[[nn.Module], Tensor] | None = None,
        tune: Sequence[str] = ("lr", "weight_decay"),
        every: int | None = 10,
        hyper_lr: float = 0.1,
    ):
        self.tune, self.every, self.hyper_lr = tuple(tune), every, hyper_lr
        _check(models, optimizers, self.tune, val_loss, every)
        self.bindings = [Binding([optimizer], frozenset(self.tune)) for optimizer in optimizers]
        self.rule = self.bindings[0].rules[0]
        _check_rules(self.bindings)
        self.states = [binding.read() for binding in self.bindings]
        if any(len(set(state.counts)) > 1 for state in self.states):
            raise ValueError(
                "a member's parameters have taken different numbers of steps: start from a fresh optimizer."
            )
        self.counts = [state.counts[0] for state in self.states]
        self.theta = torch.stack([state.theta for state in self.states])
        self.slots = [dict(state.slots) for state in self.states]
        names = {id(p): name for name, p in models[0].named_parameters()}
        self.names = ["model." + names[id(p)] for p in self.bindings[0].params]
        self.losses, self.val_losses = _Call(models[0], loss), None if val_loss is None else _Call(models[0], val_loss)
        self.numbers = [_numbers(binding) for binding in self.bindings]
        self.kinds = [Hyperparameter(kind=KIND_OF[name]) for name in self.tune]
        k, self.steps = len(self.tune), 0
        self.z = self.theta.new_zeros(k, *self.theta.shape)
        self.dslots = [{name: x.new_zeros(k, x.numel()) for name, x in slots.items()} for slots in self.slots]
        self.phi = (
            torch.stack([kind.to_free(self.values[name]) for name, kind in zip(self.tune, self.kinds, strict=True)])
            if k
            else torch.zeros(0, len(models))
        )
        self.moments = torch.zeros_like(self.phi), torch.zeros_like(self.phi)
        self.hyper_steps = 0

    @property
    def values(self) -> Tensors:
        return {name: torch.tensor([h[name] for h in self.numbers], dtype=torch.float64) for name in self.tune}

    def _each(self, call: _Call, theta: Tensor, batch: tuple[Any, ...], own: bool) -> Tensor:
        """The losses [P] of the rows of Θ."""
        params = self.bindings[0].params

        def one(row: Tensor, *args: Any) -> Tensor:
            parts = row.split([p.numel() for p in params])
            weights = {name: x.view(p.shape) for name, x, p in zip(self.names, parts, params, strict=True)}
            return functional_call(call, weights, args)

        try:
            out = vmap(one, in_dims=(0, *(0 if own else None for _ in batch)), randomness="different")(theta, *batch)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise NotImplementedError(
                f"vmap cannot take this loss ({str(error).splitlines()[0]}). Write it without `if` on a tensor's value, .item() "
                "and in-place changes of outside tensors; or train the members one by one with hypergrad.Tuner."
            ) from error
        if out.dim() != 1:
            raise ValueError(
                f"the loss of each member must be a scalar, got shape {tuple(out.shape[1:])}: take its mean."
            )
        return out

    def step(self, batch: Any, own: bool = False) -> Tensor:
        """One training step of every member; the losses [P] before it.

        `batch`: what every member trains on; with `own` its tensors have a first dimension [P], and each member has its row.
        """
        theta = self.theta.detach().requires_grad_()
        losses = self._each(self.losses, theta, (batch,), own)
        (g,) = torch.autograd.grad(losses.sum(), theta, create_graph=bool(self.tune))
        k = len(self.tune)
        hz = [
            torch.autograd.grad(g, theta, z, retain_graph=i + 1 < k)[0] if g.requires_grad and bool(z.any()) else z * 0
            for i, z in enumerate(self.z)
        ]
        with torch.no_grad():
            self._move(g.detach(), torch.stack(hz) if hz else self.z)
        self.steps += 1
        if self.tune and self.every and self.steps % self.every == 0:
            self._hyper_step()
        return losses.detach()

    def _move(self, g: Tensor, hz: Tensor) -> None:
        rows, tangents = [], []
        for i, (theta, slots, h) in enumerate(zip(self.theta, self.slots, self.numbers, strict=True)):
            self.counts[i] += 1
            h = h | {"t": self.counts[i]}
            if self.tune:
                dz, self.dslots[i] = self.rule.jvp(
                    theta, g[i], slots, h, self.z[:, i], hz[:, i], self.dslots[i], self._seeds(h)
                )
                tangents.append(dz)
            row, self.slots[i] = self.rule.step(theta, g[i], slots, h)
            rows.append(row)
        self.theta = torch.stack(rows)
        if tangents:
            self.z = torch.stack(tangents, 1)

    def _seeds(self, h: dict[str, float]) -> Tensors:
        """dh/dφ: [k, 1], the slope of the number's own φ in its own direction."""
        eye = torch.eye(len(self.tune), dtype=self.theta.dtype, device=self.theta.device)
        slopes = [float(kind.slope(torch.tensor(h[n]))) for n, kind in zip(self.tune, self.kinds, strict=True)]
        return {name: eye[:, i : i + 1] * slopes[i] for i, name in enumerate(self.tune)}

    def _along(self) -> Tensor:
        """dL/dφ [k, P]."""
        assert self.val_losses is not None
        theta = self.theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(self._each(self.val_losses, theta, (), False).sum(), theta)
        return on_host((self.z * g).sum(-1))

    def hypergradients(self) -> Tensors:
        """name → dL/dvalue [P] at the present weights, through all steps so far.

        A value that has moved stands for all its past: dφ of every step is the same.
        """
        slopes = [kind.slope(self.values[name]) for name, kind in zip(self.tune, self.kinds, strict=True)]
        return {name: d / s for name, d, s in zip(self.tune, self._along(), slopes, strict=True)}

    def _hyper_step(self) -> None:
        d = self._along()
        d = torch.where(d.isfinite(), d, 0)
        self.hyper_steps += 1
        count = torch.tensor(self.hyper_steps, dtype=torch.float64)
        self.moments = ADAM.averages(d, *self.moments, count)
        self.phi = self.phi - self.hyper_lr * ADAM.direction(*self.moments, count)
        for name, kind, phi in zip(self.tune, self.kinds, self.phi, strict=True):
            for h, x in zip(self.numbers, kind.from_free(phi).tolist(), strict=True):
                h[name] = x

    def close(self) -> None:
        """Write weights, optimizer states and values into the models and optimizers that were given."""
        for i, (binding, state) in enumerate(zip(self.bindings, self.states, strict=True)):
            for group in binding.groups:
                group.update({name: self.numbers[i][name] for name in self.tune})
            _open_state(binding, self.slots[i])
            binding.write(type(state)(self.theta[i], self.slots[i], (self.counts[i],) * len(binding.params)))


def _open_state(binding: Binding, slots: Tensors) -> None:
    """Make the tensors of a fresh optimizer's state, as its members have them."""
    for p in binding.params:
        live = binding.optimizers[0].state[p]
        for name in slots:
            live.setdefault(name, torch.zeros_like(p))
        if "exp_avg_sq" in slots or "square_avg" in slots:
            live.setdefault("step", torch.tensor(0.0))


def _numbers(binding: Binding) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, values in binding.values().items():
        if isinstance(values[0], tuple):
            out |= {f"beta{i + 1}": x for i, x in enumerate(values[0])}
        elif values[0] is not None:
            out[name] = values[0]
    return out


def _check(
    models: Sequence[nn.Module], optimizers: Sequence[Any], tune: tuple[str, ...], val_loss: Any, every: Any
) -> None:
    if not models or len(models) != len(optimizers):
        raise ValueError(f"one optimizer a model: got {len(models)} models and {len(optimizers)} optimizers.")
    shapes = [[(name, p.shape, p.dtype, p.device) for name, p in model.named_parameters()] for model in models]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("models of a population have the same parameters, by name, shape, dtype and device.")
    if any(True for model in models for _ in model.buffers()):
        raise NotImplementedError(
            "a population's models have no buffers: give BatchNorm track_running_stats=False, or use GroupNorm or LayerNorm."
        )
    if len({model.training for model in models}) > 1:
        raise ValueError("models of a population are all in train mode or all in eval mode.")
    for model, optimizer in zip(models, optimizers, strict=True):
        if len(optimizer.param_groups) != 1:
            raise NotImplementedError("a member has one param group: use hypergrad.Tuner for several.")
        order = {id(p): name for name, p in model.named_parameters()}
        held = [order.get(id(p)) for p in optimizer.param_groups[0]["params"]]
        if held != [name for name, p in model.named_parameters()]:
            raise ValueError(
                "each optimizer holds model.parameters() of its own model, all of them and in their order."
            )
        for name in tune:
            value = optimizer.param_groups[0].get(name)
            if name not in KIND_OF or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{name} is to be tuned: give every optimizer a number above 0, got {value!r}.")
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1 or None, got {every}.")
    if tune and val_loss is None:
        raise ValueError("val_loss(model) is needed where something is tuned; tune=() trains only.")


def _check_rules(bindings: Sequence[Binding]) -> None:
    rule = bindings[0].rules[0]
    if any(binding.rules[0] != rule for binding in bindings):
        raise ValueError("the optimizers of a population are of one class and have the same flags.")
    if bindings[0].fallbacks or not rule.elementwise or bindings[0].maximizes:
        raise NotImplementedError(
            "a population takes elementwise update rules: SGD, Adam, AdamW, RMSprop, Adagrad, Adamax, RAdam."
        )
