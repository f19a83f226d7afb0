"""Muon, as `torch.optim.Muon` (kellerjordan.github.io/posts/muon; arXiv 2502.16982).

    m' = μ m + (1 − μ) g
    B  = (1 − μ) g + μ m' (nesterov),  m'
    X  = B/n       n = max(‖B‖, ε)             Bᵀ where B has more rows than columns, and the result transposed back
    X ← a X + (b A + c A²) X,  A = X Xᵀ        ns_steps times; (a, b, c) ns_coefficients
    p' = (1 − η w) p − η r X                   r(shape of p): adjust_lr_fn

torch forms X in bfloat16, whatever the dtype of p, and so does `step`: it is torch's to the last bit. The derivative is that of
the iteration as written, at the unrounded B, in the dtype of p and at least float32. Rounding has no derivative, and to
differentiate at rounded matrices would only add their error. So a hypergradient is that of exact Muon along the steps that were
taken, and a finite difference of the stock optimizer shows bfloat16's rounding (2⁻⁸ of X) divided by the step of the difference
instead: `hypergrad.check` and the tests make the stock optimizer run in float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors

COEFFICIENTS = ("ns_a", "ns_b", "ns_c")


class _Iteration(NamedTuple):
    """The exact iteration. With r ≤ c rows and columns: X [r, c], A [r, r], G = b A + c A² [r, r]."""

    n: Tensor
    clamped: bool  # n = ε
    tape: list[tuple[Tensor, Tensor, Tensor]]  # X, A, G before each step
    out: Tensor


@dataclass(frozen=True)
class Muon:
    nesterov: bool = True
    ns_steps: int = 5
    eps: float = 1e-7
    adjust: str | None = None

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum", *COEFFICIENTS)
    elementwise: ClassVar[bool] = False
    decoupled: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    @property
    def second_moment_of_decay(self) -> str | None:
        return None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Muon:
        return cls(bool(group["nesterov"]), int(group["ns_steps"]), float(group["eps"]), group["adjust_lr_fn"])

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"momentum_buffer": shape}

    def _ratio(self, shape: torch.Size) -> float:
        """r."""
        rows, columns = shape
        match self.adjust:
            case None | "original":
                return math.sqrt(max(1, rows / columns))
            case "match_rms_adamw":
                return 0.2 * math.sqrt(max(rows, columns))
            case "spectral_unclamped":
                return math.sqrt(rows / columns)
        raise NotImplementedError(f"Muon with adjust_lr_fn={self.adjust!r} has no update rule: use 'original'.")

    def _averages(self, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensor]:
        """m' and B."""
        if g.dtype == torch.bfloat16 and not self.nesterov:
            raise NotImplementedError(
                "Muon with nesterov=False on bfloat16 parameters: torch scales the momentum buffer itself to norm 1 there. Pass "
                "nesterov=True, or float32 parameters."
            )
        m = s["momentum_buffer"].lerp(g, 1 - h["momentum"])
        return m, g.lerp(m, h["momentum"]) if self.nesterov else m

    def _rounded(self, x: Tensor, h: Scalars) -> Tensor:
        """X in bfloat16, in torch's order of operations."""
        a, b, c = (h[name] for name in COEFFICIENTS)
        tall, x = x.shape[0] > x.shape[1], x.bfloat16()
        x = x.T if tall else x
        x = x.div(x.norm().clamp(min=self.eps))
        for _ in range(self.ns_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        m, b = self._averages(g, s, h)
        p = p * (1 - h["lr"] * h["weight_decay"])
        return p.add_(self._rounded(b, h), alpha=-(h["lr"] * self._ratio(p.shape))), {"momentum_buffer": m}

    def _exact(self, b: Tensor, h: Scalars) -> _Iteration:
        """The iteration from B (wide, at least float32)."""
        ns_a, ns_b, ns_c = (h[name] for name in COEFFICIENTS)
        norm, tape = torch.linalg.vector_norm(b), []
        n = norm.clamp(min=self.eps)
        x = b / n
        for _ in range(self.ns_steps):
            gram = x @ x.T
            update = ns_b * gram + ns_c * (gram @ gram)
            tape.append((x, gram, update))
            x = ns_a * x + update @ x
        return _Iteration(n, bool(norm < self.eps), tape, x)

    # dX = (dB − X (X·dB))/n,  dB/ε where n = ε
    # dA = dX Xᵀ + X dXᵀ    dG = b dA + c (dA A + A dA) + db A + dc A²    dX ← a dX + G dX + dG X + da X
    def _exact_tangent(self, it: _Iteration, h: Scalars, db: Tensor, dh: Tensors) -> Tensor:
        """dX [k, r, c] from dB."""
        a, b, c = (h[name] for name in COEFFICIENTS)
        da, dcb, dcc = (dh.get(name, torch.zeros_like(db[:, :1, :1])) for name in COEFFICIENTS)
        dx = db / it.n
        if it.tape and not it.clamped:
            x = it.tape[0][0]
            dx = dx - x * (dx * x).sum((1, 2), keepdim=True)
        for x, gram, update in it.tape:
            half = dx @ x.T
            dgram = half + half.mT
            half = dgram @ gram
            dupdate = b * dgram + c * (half + half.mT) + dcb * gram + dcc * (gram @ gram)
            dx = a * dx + update @ dx + dupdate @ x + da * x
        return dx

    # From the last step up, with λ for λX after a step:
    # λa = λ·X    λG = λ Xᵀ    λb = λG·A    λc = λG·A²    λA = b λG + c (λG A + A λG)    λ ← a λ + G λ + (λA + λAᵀ) X
    # λB = (λ − X (X·λ))/n,  λ/ε where n = ε
    def _exact_adjoint(self, it: _Iteration, h: Scalars, lx: Tensor) -> tuple[Tensor, Tensors]:
        """λB and the derivatives in the coefficients."""
        a, b, c = (h[name] for name in COEFFICIENTS)
        total = torch.zeros(3, dtype=lx.dtype, device=lx.device)
        for x, gram, update in reversed(it.tape):
            lg = lx @ x.T
            total = total + torch.stack([(lx * x).sum(), (lg * gram).sum(), (lg * (gram @ gram)).sum()])
            lgram = b * lg + c * (lg @ gram + gram @ lg)
            lx = a * lx + update @ lx + (lgram + lgram.T) @ x
        if it.tape and not it.clamped:
            x = it.tape[0][0]
            lx = lx - x * (lx * x).sum()
        return lx / it.n, dict(zip(COEFFICIENTS, total, strict=True))

    # dm' = μ dm + (1 − μ) dg + dμ (m − g)    dB = (1 − μ) dg + μ dm' + dμ (m' − g) (nesterov), dm'
    # dp' = (1 − η w) dp − η r dX − dη (r X + w p) − η dw p
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        lr, wd, mu, r = h["lr"], h["weight_decay"], h["momentum"], self._ratio(p.shape)
        m, b = self._averages(g, s, h)
        dm = ds["momentum_buffer"].lerp(dg, 1 - mu)
        if "momentum" in dh:
            dm.addcmul_(dh["momentum"], s["momentum_buffer"] - g)
        db = dg.lerp(dm, mu) if self.nesterov else dm
        if "momentum" in dh and self.nesterov:
            db.addcmul_(dh["momentum"], m - g)
        tall, exact = p.shape[0] > p.shape[1], torch.promote_types(p.dtype, torch.float32)
        it = self._exact((b.T if tall else b).to(exact), h)
        dx = self._exact_tangent(it, h, (db.mT if tall else db).to(exact), dh)
        x, dx = ((y.mT if tall else y).to(p.dtype) for y in (it.out, dx))
        out = torch.add(dp * (1 - lr * wd), dx, alpha=-lr * r)
        if "lr" in dh:
            out.addcmul_(dh["lr"], torch.add(r * x, p, alpha=wd), value=-1)
        if "weight_decay" in dh:
            out.addcmul_(dh["weight_decay"], p, value=-lr)
        return out, {"momentum_buffer": dm}

    # The transpose: λη = −λp' (r X + w p)    λw = −η p λp'    λX = −η r λp'    λB by the iteration's own
    # nesterov: λg = (1 − μ) λB, λm' += μ λB, λμ = λB (m' − g);  else λm' += λB
    # λm = μ λm'    λμ += λm' (m − g)    λg += (1 − μ) λm'    λp = (1 − η w) λp'
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        lr, wd, mu, r = h["lr"], h["weight_decay"], h["momentum"], self._ratio(p.shape)
        m, b = self._averages(g, s, h)
        tall, exact = p.shape[0] > p.shape[1], torch.promote_types(p.dtype, torch.float32)
        it = self._exact((b.T if tall else b).to(exact), h)
        lb, lh = self._exact_adjoint(it, h, (-lr * r) * (lp.T if tall else lp).to(exact))
        x, lb = ((y.T if tall else y).to(p.dtype) for y in (it.out, lb))
        lm = torch.add(ls["momentum_buffer"], lb, alpha=mu if self.nesterov else 1.0)
        lg = (1 - mu) * lm
        lh |= {"lr": -lp * (r * x + wd * p), "weight_decay": lp * p * -lr, "momentum": lm * (s["momentum_buffer"] - g)}
        if self.nesterov:
            lg = lg.add_(lb, alpha=1 - mu)
            lh["momentum"] = lh["momentum"].addcmul_(lb, m - g)
        return lp * (1 - lr * wd), lg, {"momentum_buffer": mu * lm}, lh
