"""Forward passes that can be differentiated twice.

torch's fused attention kernels and compiled modules have no second derivative; the plain forms of both have one, and give the
same numbers to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ONCE = ("ScaledDotProduct", "CompiledFunction")  # in the names of their nodes in a graph


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While active, scaled_dot_product_attention is computed by matrix products, and compiled modules run uncompiled.

    Example:
        >>> q = torch.ones(1, 1, 2, 4, requires_grad=True)
        >>> with twice_differentiable():
        ...     x = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> any(once in x.grad_fn.name() for once in ONCE)
        False
    """
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield
