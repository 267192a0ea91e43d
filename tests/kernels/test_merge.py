"""Attention in parts, joined by log-sum-exp, against attention at once."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.merge import attend_with_lse, hidden_score, merge

SCALE = 0.3


def inputs(
    dtype: torch.dtype, queries: int = 9, keys: int = 20
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v with grouped heads, and a third of the keys for each of three parts."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, queries, 8, generator=generator).to(dtype)
    k, v = (torch.randn(2, 3, keys, 8, generator=generator).to(dtype) for _ in range(2))
    part_of = torch.randint(0, 3, (queries, keys), generator=generator)
    return q, k, v, part_of


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=SCALE, enable_gqa=True
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_parts_join_to_the_whole_also_where_some_are_empty(
    dtype: torch.dtype, tolerance: float, gradients: bool
) -> None:
    q, k, v, part_of = inputs(dtype)
    part_of[0] = 1
    part_of[1] = torch.where(part_of[1] == 0, 2, part_of[1])
    q.requires_grad_(gradients)
    parts = [attend_with_lse(q, k, v, part_of == part, SCALE) for part in range(3)]
    assert torch.isneginf(parts[0][1][:, :, :2]).all()
    assert all(torch.isfinite(out).all() for out, _ in parts)
    out = merge(parts)
    assert out.dtype == torch.float32
    assert (
        out - whole(q, k, v, torch.ones_like(part_of, dtype=torch.bool))
    ).abs().max() < tolerance


@pytest.mark.parametrize("gradients", [False, True])
def test_a_query_that_sees_nothing_at_all_is_zero(gradients: bool) -> None:
    q, k, v, part_of = inputs(torch.float32)
    part_of[3] = -1
    q.requires_grad_(gradients)
    out = merge([attend_with_lse(q, k, v, part_of == part, SCALE) for part in range(3)])
    assert torch.equal(out[:, :, 3], torch.zeros_like(out[:, :, 3]))
    if gradients:
        out.sum().backward()
        assert q.grad is not None and torch.isfinite(q.grad).all()
        assert torch.equal(q.grad[:, :, 3], torch.zeros_like(q.grad[:, :, 3]))


def test_a_hugely_negative_sum_counts_as_none() -> None:
    q, k, v, part_of = inputs(torch.float32)
    seen = attend_with_lse(q, k, v, part_of == 0, SCALE)
    empty = torch.full_like(v[:, :1, :9], 7.0).expand(-1, 6, -1, -1)
    joined = merge([seen, (empty, torch.full_like(seen[1], hidden_score(torch.float32)))])
    assert torch.allclose(joined, seen[0], atol=1e-7)


def test_gradients_are_those_of_the_whole() -> None:
    small_blocks = [x.double().requires_grad_() for x in inputs(torch.float32)[:3]]
    part_of = inputs(torch.float32)[3]
    part_of[0] = 1
    q, k, v = small_blocks
    joined = merge([attend_with_lse(q, k, v, part_of == part, SCALE) for part in range(3)])
    expected = whole(q, k, v, torch.ones_like(part_of, dtype=torch.bool))
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    actual_grads = torch.autograd.grad((joined * target).sum(), small_blocks)
    expected_grads = torch.autograd.grad((expected * target).sum(), small_blocks)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        assert torch.allclose(actual, wanted, atol=1e-10)


def test_numbers_and_masks_hide_alike_and_nothing_hides_nothing() -> None:
    q, k, v, part_of = inputs(torch.float32)
    mask = part_of == 0
    bias = torch.zeros(mask.shape).masked_fill(~mask, hidden_score(torch.float32))
    for by_mask, by_bias in zip(
        attend_with_lse(q, k, v, mask, SCALE), attend_with_lse(q, k, v, bias, SCALE), strict=True
    ):
        assert torch.equal(by_mask, by_bias)
    out, lse = attend_with_lse(q, k, v, None, SCALE)
    assert torch.allclose(out.double(), whole(q, k, v, torch.ones_like(mask)), atol=1e-6)
    scores = (q.unflatten(1, (3, 2)) @ k[:, :, None].transpose(-1, -2)).flatten(1, 2) * SCALE
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


def test_no_keys_at_all() -> None:
    q, k, v, _ = inputs(torch.bfloat16)
    out, lse = attend_with_lse(q, k[:, :, :0], v[:, :, :0], None, SCALE)
    assert torch.equal(out, torch.zeros_like(q).float())
    assert lse.dtype == torch.float32 and torch.isneginf(lse).all() and lse.shape == q.shape[:3]
