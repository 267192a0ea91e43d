"""Whether a result is right: rows of it against a float64 oracle, before any time is printed.

The oracle computes a sample of queries from the pattern's definition alone, so that it is
affordable at every length: O(sample * n), one KV head at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.patterns import MoBA, Pattern
from sa_patch.patterns.block_selection.block_means import block_means

FP32_TOLERANCE = 1e-5  # absolute, for inputs of size 1
HALF_FACTOR = 2.0  # half precision: times the error of torch's own attention on the same mask
# MoBA chooses by fp32 scores of size about 1. Queries whose choice hangs on less than this, or on
# less than this share of the largest score, may rightly see another block.
CHOICE_TOLERANCE = 1e-4
CHOICE_NOISE = 1e-5  # of the other patterns that choose by content: relative, on the keys
MAX_UNDECIDED = 0.1  # share of sampled queries
SAMPLE = 64


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Args:
        error: largest absolute difference from the oracle over the compared queries.
        tolerance: the largest that passes.
        compared, undecided: sampled query rows (of all heads) compared, and left out because
            a choice by content hangs on rounding there.
        reason: why it did not pass; empty where it did.
    """

    error: float
    tolerance: float
    compared: int
    undecided: int
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Expected:
    """The oracle's rows for one sequence of the batch.

    Args:
        row, length: index in the batch and its real tokens.
        positions: int64 ``[sample]``.
        output: float64 ``[heads, sample, head_dim]``.
        decided: bool ``[heads, sample]``, False where a choice by content hangs on rounding.
        peer_error, peer_square: largest and mean square error of torch's own attention on the same
            mask and in the inputs' dtype; None for fp32, where the tolerance is absolute.
    """

    row: int
    length: int
    positions: Tensor
    output: Tensor
    decided: Tensor
    peer_error: float | None
    peer_square: float | None


def sample_positions(length: int, seed: int, device: torch.device) -> Tensor:
    """At most 64 positions of ``0 .. length - 1``: first, last, and one in each equal stretch."""
    if length <= SAMPLE:
        return torch.arange(length, device=device)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, length, SAMPLE + 1, dtype=torch.float64)
    picks = edges[:-1] + torch.rand(SAMPLE, generator=generator, dtype=torch.float64) * edges[1]
    positions = picks.long().clamp(max=length - 1)
    positions[0], positions[-1] = 0, length - 1
    return positions.unique().to(device)


@torch.no_grad()
def expect(
    shown: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    row: int = 0,
    length: int | None = None,
    seed: int = 0,
) -> Expected:
    """The oracle on a sample of the queries of one sequence.

    Args:
        q: ``[batch, heads, n, head_dim]``; k, v: ``[batch, kv_heads, n, head_dim]``.
        length: real tokens of the row; all n by default.
    """
    length = q.shape[2] if length is None else length
    positions = sample_positions(length, seed + length, q.device)
    q_row, k, v = q[row, :, :length], k[row, :, :length], v[row, :, :length]
    q = q_row[:, positions]
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    look = partial(_visible, shown, positions, length, layer, heads)
    mask = look(q_row, k)
    scale = 1 / math.sqrt(q.shape[2])
    output = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float64, device=q.device)
    half = q.dtype in (torch.float16, torch.bfloat16)
    peer = torch.empty_like(output) if half else None
    for kv_head in range(k.shape[0]):
        own = slice(kv_head * group, (kv_head + 1) * group)
        scores = q[own].double() @ k[kv_head].double().T * scale
        weights = scores.masked_fill_(~mask[own], -torch.inf).softmax(-1)
        output[own] = weights @ v[kv_head].double()
        if peer is not None:
            keys, values = (t[kv_head].expand(1, group, -1, -1) for t in (k, v))
            peer[own] = scaled_dot_product_attention(
                q[own][None], keys, values, attn_mask=mask[own][None], scale=scale
            )[0].double()
    decided = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if isinstance(shown, MoBA) and shown.computed_as is shown:
        decided = _decided(shown, q, k, positions)
    elif shown.reads_content:
        # A choice that rounding may turn turns when the keys are moved by as much.
        noise = torch.randn(k.shape, generator=_generator(seed, k.device), device=k.device)
        moved = k.float() * (1 + CHOICE_NOISE * noise)
        decided = (look(q_row.float(), moved) == look(q_row.float(), k.float())).all(-1)
    theirs = None if peer is None else (peer - output)[decided].abs()
    return Expected(
        row,
        length,
        positions,
        output,
        decided,
        None if theirs is None or not len(theirs) else float(theirs.max()),
        None if theirs is None or not len(theirs) else float(theirs.square().mean()),
    )


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _visible(
    shown: Pattern,
    positions: Tensor,
    length: int,
    layer: int,
    heads: int,
    q: Tensor,
    k: Tensor,
) -> Tensor:
    """The keys in view of the queries at `positions`: bool ``[heads, sample, length]``.

    Args:
        q: ``[heads, length, head_dim]``, of which patterns with shared choices read whole tiles.
        k: ``[kv_heads, length, head_dim]``.
    """
    seen = partial(shown.visible, seq_len=length, layer=layer, heads=heads, k=k)
    shared = shown.shared_queries
    if shared == 1:
        return seen(positions, q=shown.queries_read(q, positions)).expand(heads, -1, -1)
    rows = []
    for position in positions.tolist():
        start = position // shared * shared
        tile = torch.arange(start, position + 1, device=q.device)
        rows.append(seen(tile, q=q[:, tile])[:, -1].expand(heads, -1))
    return torch.stack(rows, 1)


def judge(out: Tensor, expected: Expected) -> Verdict:
    """Compare ``out [batch, heads, n, head_dim]`` with the oracle's rows."""
    rows = out[expected.row].index_select(1, expected.positions.to(out.device)).double()
    difference = (rows - expected.output)[expected.decided].abs()
    compared = int(expected.decided.sum())
    undecided = expected.decided.numel() - compared
    error = float(difference.max()) if compared else math.nan
    half = expected.peer_error is not None
    tolerance = HALF_FACTOR * expected.peer_error if half else FP32_TOLERANCE  # type: ignore[operator]
    reason = ""
    if undecided > MAX_UNDECIDED * expected.decided.numel():
        reason = f"cannot be checked: {undecided} of {expected.decided.numel()} choices are ties"
    elif not math.isfinite(error):
        reason = "the result is not finite"
    elif error > tolerance:
        reason = f"off by {error:.1e}, allowed {tolerance:.1e}"
    elif half and float(difference.square().mean()) > HALF_FACTOR**2 * (expected.peer_square or 0):
        reason = "the root mean square error is over twice that of torch's own attention"
    return Verdict(error, tolerance, compared, undecided, reason)


def merge(verdicts: list[Verdict]) -> Verdict:
    """One verdict for the rows of a batch: the worst of them."""
    worst = max(verdicts, key=lambda one: (not one.passed, one.error / (one.tolerance or 1e-300)))
    return Verdict(
        worst.error,
        worst.tolerance,
        sum(one.compared for one in verdicts),
        sum(one.undecided for one in verdicts),
        worst.reason,
    )


def _decided(pattern: MoBA, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Queries whose last chosen block is clearly ahead of the best one left out.

    Args:
        q: ``[heads, sample, head_dim]``; k: ``[kv_heads, n, head_dim]``.

    Returns:
        bool ``[heads, sample]``.
    """
    means = block_means(k, pattern.block_size).double()
    group = q.shape[0] // k.shape[0]
    scores = q.double() @ means.repeat_interleave(group, 0).transpose(1, 2)
    earlier = torch.arange(means.shape[1], device=q.device) < (
        positions[:, None] // pattern.block_size
    )
    scores = scores.masked_fill(~earlier, -torch.inf)
    picks = pattern.topk - 1
    if picks == 0 or picks >= scores.shape[-1]:
        return torch.ones(scores.shape[:2], dtype=torch.bool, device=q.device)
    ranked = scores.topk(picks + 1, dim=-1).values
    last, left_out = ranked[..., picks - 1], ranked[..., picks]
    size = ranked[..., 0].abs().nan_to_num(0, 0, 0).clamp(min=1.0)
    # Where no block is left out the margin is infinite, or nan between two that are not there.
    return ~((last - left_out) <= CHOICE_TOLERANCE * size)
