"""Choices under a threshold: what is estimated, what it costs, and what changes it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sa_patch import sparse_attention
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS
from sa_patch.patterns import BlockTopK, Sinks
from sa_patch.patterns.block_selection.worth_reading import BlockStatistics, log_masses

N, HEADS, KV_HEADS, DIM = 96, 4, 2, 8
PATTERN = BlockTopK(4, 3, 4, 0, branch=0, shared=8, segment=16, threshold=0.2)


def content(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(HEADS, N, DIM, generator=generator)
    return q, 2 * torch.randn(KV_HEADS, N, DIM, generator=generator)


def test_the_estimate_is_exact_for_equal_keys_and_for_a_normal_spread() -> None:
    q = torch.randn(1, 1, 3, DIM) * DIM**-0.5
    equal = torch.randn(1, 1, DIM).expand(1, 6, DIM)
    found = log_masses(q, BlockStatistics.of(equal, 6), 1, 6)
    assert torch.allclose(found, (q @ equal[:, None].mT).logsumexp(-1, keepdim=True), atol=1e-5)
    # So many keys that their exponentials' mean is that of the distribution.
    many = 0.7 * torch.randn(1, 1 << 15, DIM, generator=torch.Generator().manual_seed(0)) + 1
    found = log_masses(q, BlockStatistics.of(many, 1 << 15), 1, 1 << 15)
    assert torch.allclose(found, (q @ many[:, None].mT).logsumexp(-1, keepdim=True), atol=0.02)
    assert (found - q @ many.mean(1)[0, :, None] - torch.tensor(1 << 15).log() > 0.02).any()


def test_only_blocks_that_get_enough_are_chosen_and_of_these_the_largest() -> None:
    far, near = torch.zeros(2, DIM).unbind(0)
    far[0], near[1] = 3.0, 3.0
    k = torch.zeros(1, N, DIM)
    k[:, 20:24], k[:, 40:44] = far, 2 * far
    q = torch.stack([3 * far, 3 * near]).expand(1, 2, DIM).repeat(1, N // 2, 1)
    k[:, 80:] = near
    pattern = replace(PATTERN, shared=1, threshold=0.9)
    picks = pattern.own_choices(q[:, 80:], k, range(80, N))[0]
    blocks = [sorted(set(row) - {-1}) for row in picks.tolist()]
    # Even queries look far, odd ones near.
    assert blocks == [[4, 9], []] * 8
    fewer = replace(pattern, topk=1).own_choices(q[:, 80:], k, range(80, N))[0]
    assert fewer.flatten().tolist() == [9, -1] * 8


def test_a_higher_threshold_chooses_a_part_of_what_a_lower_one_does() -> None:
    q, k = content()
    chosen = [
        replace(PATTERN, threshold=share).visible(torch.arange(N), N, heads=HEADS, q=q, k=k)
        for share in (3.0, 1.0, 0.2, 1e-9)
    ]
    for higher, lower in pairwise(chosen):
        assert higher.sum() < lower.sum()
        assert not (higher & ~lower).any()


def test_heads_that_choose_together_take_what_one_of_them_wants() -> None:
    q, k = content(1)
    alone = replace(PATTERN, shared=1, topk=20, grouped=False)
    seen = alone.visible(torch.arange(N), N, heads=HEADS, q=q, k=k)
    together = replace(alone, grouped=True).visible(torch.arange(N), N, heads=HEADS, q=q, k=k)
    assert torch.equal(together[::2], seen[::2] | seen[1::2])
    assert not torch.equal(together, seen)


def test_any_order_of_queries_and_any_parts_will_do() -> None:
    q, k = content(2)
    pattern = replace(PATTERN, shared=1)
    whole = pattern.own_choices(q, k, range(N))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = pattern.own_choices(q[:, order], k, order)
    assert torch.equal(shuffled.sort(-1).values, whole[:, order].sort(-1).values)
    parts = [
        pattern.own_choices(q[:, a : a + 7], k, range(a, min(a + 7, N))) for a in range(0, N, 7)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert (whole >= 0).any() and (whole < 0).any()
    assert pattern.own_choices(q[:, :0], k, range(0)).shape == (KV_HEADS, 0, pattern.topk)


def test_what_is_no_number_is_never_chosen() -> None:
    q, k = content(3)
    chosen = PATTERN.own_choices(q, k, range(N))
    k[:, 24:28] = torch.nan
    found = PATTERN.own_choices(q, k, range(N))
    after = slice(32, None)
    assert (chosen[:, after] == 5).any() and not (found[:, after] == 5).any()
    assert ((chosen == found) | (chosen == 5)).all(-1).float().mean() > 0.5


@pytest.mark.parametrize("backend", ["reference", "banded"])
@pytest.mark.parametrize("pattern", [PATTERN, Sinks(6) | PATTERN], ids=str)
def test_a_layer_with_another_scale_chooses_by_its_own_scores(
    pattern: BlockTopK, backend: str
) -> None:
    q, k = (each[None] for each in content(4))
    v = torch.randn(1, KV_HEADS, N, DIM, generator=torch.Generator().manual_seed(5))
    scale = 3 * DIM**-0.5
    given = sparse_attention(q, k, v, pattern, scale=scale, backend=backend)
    scaled = sparse_attention(3 * q, k, v, pattern, backend=backend)
    assert torch.allclose(given, scaled, atol=1e-5)
    seen = [PATTERN.visible(torch.arange(N), N, heads=HEADS, q=x, k=k[0]) for x in (q[0], 3 * q[0])]
    assert not torch.equal(*seen)


@pytest.mark.parametrize("head_dim", [8, 24])
def test_what_would_pad_heads_refuses(head_dim: int) -> None:
    q, k = torch.randn(1, 4, 64, head_dim), torch.randn(1, 2, 64, head_dim)
    able, reason = BACKENDS["flex"].supports(PATTERN, q, k)
    assert not able and "a threshold weighs" in reason
    assert "weighs" not in BACKENDS["flex"].supports(replace(PATTERN, threshold=0.0), q, k)[1]


def test_all_that_is_weighed_is_paid_for() -> None:
    dots = PATTERN.selection_dots(N, group=2)
    # Nothing to choose from in the first segment; later the sinks, the segment so far, all blocks.
    assert dots[15] == 0
    assert dots[50] == 4 + (50 - 48 + 1) + (48 - 4) // 4
    assert PATTERN.means_read(torch.arange(48, 64)) == 4 + 16 + 11
    assert PATTERN.means_read(torch.arange(8)) == 0
    assert PATTERN.keys_are_bounds and PATTERN.saturated(16) and not PATTERN.saturated(24)
    with pytest.raises(UserError, match="only be counted where its blocks are chosen"):
        replace(PATTERN, shared=1).count_visible(N)
