"""prototype"""
from __future__ import annotations
import math, os
from collections import deque
from typing import Any
import torch
from torch import Tensor
K=eval(os.environ.get("RT","{}"))
CUT = K.get("cut",4.0)
KAPPA = K.get("kappa",1.0)
SHARE = K.get("share",0.03)
M = K.get("m",1)
AGAIN = K.get("again",0.1)
PAIRED = K.get("paired",3.0)
WAIT = K.get("wait",2)
FIRST = K.get("first",1)
ON = K.get("on",1)
MEM = K.get("mem",12)
REL = K.get("rel",0.0)
ROW = K.get("row",1)
LOG = os.environ.get("RTLOG")

class Retreat:
    def __init__(self, first: float):
        self.first = first if math.isfinite(first) else math.nan
        self.start = None
        self.var = 0.0
        self.d2 = deque(maxlen=MEM)
        self.phase = None
        self.restart()

    def restart(self):
        self.best, self.theta, self.step = math.inf, None, 0
        if FIRST and self.start is not None and math.isfinite(self.first):
            self.best, self.theta = self.first, self.start.theta
        self.window = deque(maxlen=M)
        self.recent = deque(maxlen=3)
        self.row = 0
        self.n = 0

    def observe(self, t: int, value: float, theta: Tensor, phase, pairs) -> bool:
        """Whether to go back."""
        if not ON or not math.isfinite(value):
            return False
        if t > AGAIN * self.total:
            self.start = None
        if phase != self.phase and self.phase is not None:
            self.restart()
        if phase != self.phase:
            self.phase = phase
        self.window.append(value); self.recent.append(value)
        if len(self.recent) == 3:
            a, b, c = self.recent
            self.d2.append(abs(a - 2 * b + c) / 6**0.5)
            self.var = (sorted(self.d2)[len(self.d2) // 2] / 0.6745) ** 2
        s = sum(self.window) / len(self.window)
        if s < self.best:
            self.best, self.theta, self.step, self.row = s, theta.clone(), t, 0
            return False
        self.n += 1
        first = self.first if math.isfinite(self.first) else self.best
        margin = max(KAPPA * math.sqrt(self.var), SHARE * max(first - self.best, 0), REL * abs(self.best))
        self.row = self.row + 1 if s > self.best + margin and len(self.window) == M else 0
        if self.row < ROW or self.n < WAIT:
            return False
        now, then = pairs(self.theta)
        d = [a - b for a, b in zip(now, then)]
        mean = sum(d) / len(d)
        se = (sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d)) ** 0.5
        level = sum(then) / len(then)
        if not mean > max(PAIRED * se, SHARE * max(first - level, 0)):
            if LOG: print(f"   not at {t}: {s:.4g} best {self.best:.4g} at {self.step}: {mean:.4g} +- {se:.3g}")
            self.best, self.n = level, 0
            return False
        if LOG: print(f"   retreat at {t}: {s:.4g} best {self.best:.4g} at {self.step} sd {math.sqrt(self.var):.3g} phase {phase}")
        theta = self.theta
        self.restart()
        self.back = theta
        return True
