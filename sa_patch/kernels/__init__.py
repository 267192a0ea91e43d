"""HOW is attention over a pattern computed: one file per backend, one shared signature."""

from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.caches import expect_layers, forget_plans
from sa_patch.kernels.dispatch import (
    BACKENDS,
    attend,
    check_backend,
    choose_backend,
    sparse_attention,
)

__all__ = [
    "BACKENDS",
    "PLAIN",
    "Backend",
    "Softmax",
    "Spans",
    "attend",
    "check_backend",
    "choose_backend",
    "expect_layers",
    "forget_plans",
    "sparse_attention",
]
