"""What every benchmark is asked to do, checked before anything slow begins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sa_patch.errors import UserError, choice
from sa_patch.kernels import BACKENDS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that all benchmarks have.

    Args:
        n: lengths in tokens, ascending.
        backends: names in `BACKENDS`, and "auto" where `allows_auto`.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        threads: torch threads; None leaves them as they are.
        budget: seconds for measuring.
        out: folder of the results, made if it is missing.

    Raises:
        UserError: for a value that is not allowed.
    """

    allows_auto: ClassVar[bool] = False

    n: tuple[int, ...]
    backends: tuple[str, ...]
    dtype: str
    device: str
    threads: int | None
    budget: float
    out: Path

    def __post_init__(self) -> None:
        at_least_one(self.n, "n")
        object.__setattr__(self, "n", tuple(sorted(set(self.n))))
        object.__setattr__(self, "backends", tuple(dict.fromkeys(self.backends)))
        if self.threads is not None:
            at_least_one(self.threads, "threads")
        if not 0 < self.budget < float("inf"):
            raise UserError(f"budget must be a positive number of seconds, got {self.budget}")
        choice(self.dtype, "dtype", DTYPES)
        if not self.backends:
            raise UserError("name at least one backend")
        for name in self.backends:
            choice(name, "backend", [*(["auto"] if self.allows_auto else []), *BACKENDS])

    def described(self) -> dict[str, Any]:
        """The options as JSON values."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def choose_device(device: str | None) -> str:
    """The device that was asked for; by default a GPU if there is one.

    Raises:
        UserError: for one that is unknown or not there.
    """
    found = torch.cuda.is_available()
    device = choice(device or ("cuda" if found else "cpu"), "device", DEVICES)
    if device == "cuda" and not found:
        raise UserError("torch sees no CUDA device here; use --device cpu")
    return device


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise `UserError` unless a layer can have so many query and KV heads of this width."""
    for field, value in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        at_least_one(value, field)
    if heads % kv_heads:
        raise UserError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")


def at_least_one(given: Any, field: str) -> None:
    """Raise `UserError` unless `given` is a whole number from 1 on, or several of them."""
    values = given if isinstance(given, tuple) else (given,)
    if not values:
        raise UserError(f"{field} must name at least one number")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{field} must be a whole number of at least 1, got {value!r}")
