"""What a call is given, checked and brought into the form that every backend takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.errors import UserError

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# Narrower than float32, in which a smaller factor is 0 and a larger one infinite: NaN both.
_LEAST_FACTOR, _GREATEST_FACTOR = 1e-30, 1e30


def check_factor(name: str, value: float | Tensor) -> float:
    """Return `value`, of `name`, as a float if scores can be scaled or capped by it.

    Raises:
        UserError: for what is no number above 0.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real) or not _LEAST_FACTOR <= value <= _GREATEST_FACTOR:
        raise UserError(
            f"{name} must be a number above 0 (from {_LEAST_FACTOR} to {_GREATEST_FACTOR}), "
            f"got {value!r}"
        )
    return float(value)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *, same_width: bool = True) -> None:
    """Raise `UserError` unless q, k and v can attend to each other.

    Args:
        same_width: whether k and v must have vectors of one length.
    """
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise UserError(f"q, k and v must be tensors of torch, got {kinds}")
    kept = slice(None) if same_width else slice(3)
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[kept] != v.shape[kept]:
        raise UserError(
            "q must be [batch, q_heads, nq, head_dim] and k, v [batch, kv_heads, n, head_dim], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % max(k.shape[1], 1):
        raise UserError(
            "q and k must share batch and head_dim, and q_heads must be a multiple of kv_heads, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise UserError(f"there are more queries ({q.shape[2]}) than keys ({k.shape[2]})")
    if not q.device == k.device == v.device:
        raise UserError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}; move them "
            "with .to(device)"
        )
    taken = {_dtype_under_autocast(x) for x in (q, k, v)}
    if len(taken) > 1 or not taken <= _DTYPES:
        given = ", ".join(str(x.dtype).split(".")[-1] for x in (q, k, v))
        raise UserError(
            "q, k and v must be of one dtype (float16, bfloat16, float32 or float64), got "
            f"{given}; cast them with .to(dtype)"
        )


def autocasts(device: torch.device) -> bool:
    """Whether `torch.autocast` is on for a device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def cast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as torch's own attention takes them: under autocast, on their device, in its dtype.

    Models may hand over q and k in fp32, from their rotary embeddings, beside v in half precision.
    """
    return tuple(x.to(_dtype_under_autocast(x)) for x in tensors)


def _dtype_under_autocast(x: Tensor) -> torch.dtype:
    # Autocast leaves doubles alone, and whole numbers.
    if x.dtype == torch.float64 or not x.is_floating_point() or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


@contextmanager
def outside_autocast(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`cast_together`, and autocast off inside, where fp32 is meant where it is written."""
    cast, device = cast_together(*tensors), tensors[0].device
    with torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext():
        yield cast


def in_widths(v: Tensor, width: int) -> list[Tensor]:
    """Values narrower or wider than keys (MLA) in parts as wide as those, the last filled up.

    Keys are never widened instead: by their width some patterns choose.

    Args:
        v: ``[batch, kv_heads, n, any]``.
        width: of the keys.
    """
    return [pad(part, (0, width - part.shape[3])) for part in v.split(width, dim=3)]
