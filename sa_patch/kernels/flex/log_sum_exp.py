"""The log-sum-exp of FlexAttention's scores, which it does not return on CPUs.

There every query sees one more key, the sentinel, whose score is known, and two more channels of
the values sum the weights: those of real keys, and that of the sentinel. The ratio of the two sums
is that of the real keys' exponentials to the sentinel's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Channels added to queries, keys and values: of the values one counts real keys and one the
# sentinel; of queries and keys the first is the sentinel's alone.
_EXTRA = 2
# Exponentials are normal fp32 numbers down to 1e-38; a smaller sum than this is measured anew.
_SMALLEST = 1e-30

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``attention(q, k, v)`` over keys that end with `sentinel_key`."""


def sentinel_index(keys: int, block: int) -> int:
    """Where the sentinel stands: in a block of its own, behind the last one of `keys`."""
    return -(-keys // block) * block


def with_sentinel(k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values that end with the sentinel at `index`.

    Args:
        k, v: as `measured` hands them to an attention, ``[batch, kv_heads, n, head_dim + 2]``.
    """
    room = (0, 0, 0, index + 1 - k.shape[2])
    k, v = torch.nn.functional.pad(k, room), torch.nn.functional.pad(v, room)
    k[:, :, index, -2] = 1
    v[:, :, index, -1] = 1
    return k, v


def measured(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of an attention over keys that end with the sentinel.

    The sentinel's score is a guess of the log-sum-exp, at first the score of a query's own key,
    which it sees somewhere in the union. A part of the union far below this is as good as
    nothing in the sum, so it may vanish. For a part that is far above it the next guess is the mean
    score under its own softmax, which is at most log n below the log-sum-exp.

    Args:
        q: ``[batch, q_heads, n, head_dim]``, fp32.
        k, v: ``[batch, kv_heads, n, head_dim]``, fp32.

    Returns:
        output like q, and ``[batch, q_heads, n]``, -inf where a query sees no key.
    """
    group = q.shape[1] // k.shape[1]
    guess = scale * (q * k.repeat_interleave(group, dim=1)).sum(-1)
    keys = torch.nn.functional.pad(k, (0, _EXTRA))

    def attend(values: Tensor) -> Tensor:
        # Scores are scaled; with a scale of 0 all of them are 0.
        own = guess / scale if scale else guess
        queries = torch.cat([q, own[..., None], torch.zeros_like(own)[..., None]], dim=-1)
        ones = torch.nn.functional.pad(values, (0, 1), value=1.0)
        return attention(queries, keys, torch.nn.functional.pad(ones, (0, 1)))

    joined = attend(v)
    far = joined[..., -1] < _SMALLEST
    if far.any():
        mean_key = attend(k)[..., :-_EXTRA]
        guess = torch.where(far, scale * (q * mean_key).sum(-1), guess)
        joined = attend(v)
    real, sentinel = joined[..., -2], joined[..., -1]
    lse = real.log() - sentinel.log() + guess
    return joined[..., :-_EXTRA] / real.clamp(min=torch.finfo(real.dtype).tiny)[..., None], lse
