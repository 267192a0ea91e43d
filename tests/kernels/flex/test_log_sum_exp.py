"""The log-sum-exp that backend `flex` measures by a sentinel, over attention in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.flex.log_sum_exp import measured, sentinel_index, with_sentinel

N, BLOCK = 50, 16
TOLERANCE = 1e-5


def dense(visible: Tensor, scale: float) -> tuple:
    """Attention over the pairs ``visible [n, n]`` and the sentinel, and a count of its calls."""
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q)
        index = sentinel_index(k.shape[2], BLOCK)
        k, v = with_sentinel(k, v, index)
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
        shown = torch.zeros(N, index + 1, dtype=torch.bool)
        shown[:, :N], shown[:, index] = visible, True
        weights = scores.masked_fill(~shown, -torch.inf).softmax(-1)
        return weights @ v.repeat_interleave(group, 1)

    return attention, calls


def numbers(size: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, N, 8, generator=generator) * size
    k = torch.randn(2, 2, N, 8, generator=generator) * size
    return q, k, torch.randn(2, 2, N, 8, generator=generator)


def expected(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple:
    wide = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q, k, v))
    q, k, v = wide
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


def causal(*, own: bool = True) -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril(0 if own else -1)


@pytest.mark.parametrize("scale", [0.35, 1.0, 0.0, -0.5])
def test_sum_and_output_are_exact(scale: float) -> None:
    q, k, v = numbers(1.0)
    attention, calls = dense(causal(), scale)
    out, lse = measured(attention, q, k, v, scale)
    wanted, total = expected(q, k, v, causal(), scale)
    assert (out - wanted).abs().max() <= TOLERANCE
    assert (lse - total).abs().max() <= TOLERANCE
    assert len(calls) == 1


def test_a_query_that_sees_nothing_has_none() -> None:
    q, k, v = numbers(1.0)
    out, lse = measured(dense(causal(own=False), 0.35)[0], q, k, v, 0.35)
    _, total = expected(q, k, v, causal(own=False), 0.35)
    assert (lse[:, :, 0] == -torch.inf).all() and not out[:, :, 0].any()
    assert (lse - total)[:, :, 1:].abs().max() <= TOLERANCE


def test_scores_far_above_the_own_one_are_measured_anew() -> None:
    """Scores of several hundred, whose exponentials no float holds."""
    q, k, v = numbers(12.0)
    attention, calls = dense(causal(own=False), 0.35)
    out, lse = measured(attention, q, k, v, 0.35)
    wanted, total = expected(q, k, v, causal(own=False), 0.35)
    own = (q * k.repeat_interleave(2, 1)).sum(-1) * 0.35
    assert (total - own).max() > 100 and (total - own)[:, :, 1:].min() < -100
    assert len(calls) == 3
    assert torch.isfinite(out).all() and not lse.isnan().any()
    # What is far below the own score, which another part holds, may vanish.
    counts = total > own - 60
    assert ((lse - total).abs() / total.abs().clamp(min=1))[counts].max() <= TOLERANCE
    assert (lse < own - 40)[~counts].all()
    # A score of 500 is known to 3e-5 in fp32, and weights with it.
    assert (out - wanted).abs().amax(-1)[counts].max() <= 1e-3


def test_a_row_measured_anew_changes_no_other() -> None:
    q, k, v = numbers(1.0)
    attention, _ = dense(causal(own=False), 1.0)
    before = measured(attention, q, k, v, 1.0)
    loud = q.clone()
    loud[:, :, -1] *= 500
    after = measured(attention, loud, k, v, 1.0)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, :-1], new[:, :, :-1])
