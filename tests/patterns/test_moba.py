"""MoBA's choice at the edge of what floats hold."""

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.patterns import MoBA, parse_pattern


def test_a_score_of_minus_infinity_hides_no_earlier_block() -> None:
    """Products of finite numbers overflow; the block is the worst, and still an earlier one."""
    q = torch.full((1, 2, 1), 3e38)
    means = torch.tensor([[[1e-38], [-3e38], [2e-38], [5.0]]])
    own = torch.tensor([2, 3])
    assert float(q[0, 0, 0] * means[0, 1, 0]) == -torch.inf
    ranked = MoBA(4, topk=3).rank_blocks(q, means, own)
    assert ranked.tolist() == [[[0, 1], [2, 0]]]
    assert MoBA(4, topk=4).rank_blocks(q, means, own).tolist() == [[[0, 1, -1], [2, 0, 1]]]


def test_text_and_window_name_what_is_shared() -> None:
    pattern = MoBA(64, 2, shared=32, grouped=True)
    assert parse_pattern("moba:window=128,shared=32,grouped=true") == pattern
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.shared_queries == 32
    # Choices of heads alone may coincide for no query of its own.
    assert not MoBA(64, 2, grouped=True).counts_need_content
    assert float(MoBA(64, 3, grouped=True).selection_dots(256, 4)[-1]) == 3 / 4


@pytest.mark.parametrize("text", ["moba:64,2,shared=0", "moba:64,2,grouped=2"])
def test_what_cannot_be_shared_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="shared must be|grouped must be"):
        parse_pattern(text)


def test_many_picks_are_ranked_like_few() -> None:
    """Beyond a number of picks they are sorted, below it found one by one."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (4, 30, 3), generator=generator).float()
    means = torch.randint(-2, 3, (2, 20, 3), generator=generator).float()
    own = torch.arange(30) % 21
    few = MoBA(4, topk=9).rank_blocks(q, means, own)
    many = MoBA(4, topk=15).rank_blocks(q, means, own)
    assert torch.equal(few, many[..., :8])
