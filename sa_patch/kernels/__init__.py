"""HOW is attention over a pattern computed: one file per backend, one shared signature."""

from sa_patch.kernels.backend import Backend, Spans
from sa_patch.kernels.dispatch import (
    BACKENDS,
    attend,
    check_backend,
    choose_backend,
    sparse_attention,
)
from sa_patch.kernels.remembered import forget_plans

__all__ = [
    "BACKENDS",
    "Backend",
    "Spans",
    "attend",
    "check_backend",
    "choose_backend",
    "forget_plans",
    "sparse_attention",
]
