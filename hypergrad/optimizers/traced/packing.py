"""What an optimizer remembers besides tensors and floats (memory.py) as plain containers, which load with weights_only=True.

What cannot be written down, such as a function, is taken from the live optimizer's memory at the same place.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.traced.memory import Placeholder

_PLAIN = (bool, int, float, str, Tensor)


def packed(x: Any) -> list[Any]:
    """[kind, content]."""
    if x is None or type(x) in _PLAIN or isinstance(x, Tensor):
        return ["plain", x]
    if isinstance(x, Placeholder):
        return ["placeholder", x.kind, packed(x.key), None if x.shape is None else list(x.shape), x.like]
    if isinstance(x, dict):
        return ["dict", [[packed(k), packed(y)] for k, y in x.items()]]
    if type(x) in (list, tuple):
        return [type(x).__name__, [packed(y) for y in x]]
    if isinstance(x, deque):
        return ["deque", [packed(y) for y in x], x.maxlen]
    return ["live"]


def unpacked(saved: list[Any], live: Any) -> Any:
    """What `packed` was given. live: what the live optimizer has at the same place."""
    kind, *content = saved
    if kind == "plain":
        return content[0]
    if kind == "placeholder":
        name, key, shape, like = content
        return Placeholder(name, unpacked(key, None), None if shape is None else torch.Size(shape), like)
    if kind == "dict":
        mine = live if isinstance(live, dict) else {}
        out = copy.copy(mine)
        out.clear()
        keys = [unpacked(k, None) for k, _ in content[0]]
        out.update({k: unpacked(y, mine.get(k)) for k, (_, y) in zip(keys, content[0], strict=True)})
        return out
    if kind in ("list", "tuple", "deque"):
        mine = list(live) if isinstance(live, (list, tuple, deque)) else []
        each = [unpacked(y, mine[i] if i < len(mine) else None) for i, y in enumerate(content[0])]
        return deque(each, content[1]) if kind == "deque" else (tuple(each) if kind == "tuple" else each)
    return live
