"""The block lists of backend `flex`, against the visible pairs themselves, in plain torch.

Not compiled, and exhaustive over pairs: what a list leaves out, no kernel would ever see.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sa_patch.kernels import flex_blocks
from sa_patch.kernels.flex_blocks import BlockLists, chosen_blocks, ring_blocks, window_blocks
from sa_patch.kernels.flex_kernel import listed
from sa_patch.patterns import MoBA

BLOCKS = st.sampled_from([1, 2, 3, 4, 8, 16])
LENGTHS = st.integers(1, 90)


def listed_blocks(counts: Tensor, blocks: Tensor, columns: int) -> Tensor:
    """bool ``[rows, columns]`` of one head's lists; every entry that counts stands there once."""
    dense = torch.zeros(len(counts), columns, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        entries = blocks[row, :count].tolist()
        assert len(set(entries)) == len(entries) == count, f"row {row} lists a block twice"
        dense[row, entries] = True
    return dense


def by_blocks(visible: Tensor, block: int) -> Tensor:
    """Pairs ``[n, n]`` grouped: ``[rows, rows, block, block]``, nothing visible beyond n."""
    rows = -(-len(visible) // block)
    square = torch.zeros(rows * block, rows * block, dtype=torch.bool)
    square[: len(visible), : len(visible)] = visible
    return square.view(rows, block, rows, block).transpose(1, 2)


def check_full_blocks(lists: BlockLists, visible: Tensor, block: int) -> Tensor:
    """Full blocks hold visible pairs only, of the pairs that exist; returns them dense."""
    assert lists.full_counts is not None and lists.full_blocks is not None
    rows = len(lists.counts)
    full = listed_blocks(lists.full_counts, lists.full_blocks, rows)
    real = by_blocks(torch.ones_like(visible), block)
    whole = (by_blocks(visible, block) | ~real).flatten(2).all(-1)
    assert (whole | ~full).all(), "a full block hides a pair"
    return full


@settings(max_examples=300, deadline=None)
@given(seq_len=LENGTHS, window=st.integers(1, 100), block=BLOCKS)
def test_window_lists_are_exactly_the_blocks_with_a_visible_pair(
    seq_len: int, window: int, block: int
) -> None:
    behind = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    visible = (behind >= 0) & (behind < window)
    lists = window_blocks(seq_len, window, block)
    rows = -(-seq_len // block)
    partial = listed_blocks(lists.counts, lists.blocks, rows)
    full = check_full_blocks(lists, visible, block)
    assert not (partial & full).any(), "a block counted twice enters the softmax twice"
    assert torch.equal(partial | full, by_blocks(visible, block).flatten(2).any(-1))
    # The mask is tested only at the two edges of the band.
    assert lists.blocks.shape[1] <= 3
    assert lists.full_blocks is not None
    assert lists.full_blocks.shape[1] <= max(1, window // block)


@settings(max_examples=300, deadline=None)
@given(seq_len=LENGTHS, reach=st.integers(0, 60), block=BLOCKS, circular=st.booleans())
def test_ring_lists_are_exactly_the_blocks_with_a_near_pair(
    seq_len: int, reach: int, block: int, circular: bool
) -> None:
    apart = (torch.arange(seq_len)[:, None] - torch.arange(seq_len)).abs()
    if circular:
        apart = torch.minimum(apart, seq_len - apart)
    lists = ring_blocks(seq_len, reach, circular, block)
    rows = -(-seq_len // block)
    near = by_blocks(apart <= reach, block).flatten(2).any(-1)
    found = listed_blocks(lists.counts, lists.blocks, rows)
    assert (found | ~near).all(), "a visible pair is not listed"
    # With the whole ring in reach there is no telling which of the blocks is superfluous.
    if 2 * reach + block < seq_len:
        assert torch.equal(found, near)
    assert lists.full_counts is None
    assert lists.blocks.shape[1] <= 2 * reach // block + 4


@settings(max_examples=150, deadline=None)
@given(
    seq_len=st.integers(2, 70),
    size=st.integers(1, 12),
    topk=st.integers(1, 4),
    block=BLOCKS,
    seed=st.integers(0, 2**20),
)
def test_chosen_lists_are_exactly_the_blocks_with_a_visible_pair(
    seq_len: int, size: int, topk: int, block: int, seed: int
) -> None:
    pattern = MoBA(size, topk)
    if pattern.saturated(seq_len):
        return
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, seq_len, 3, generator=generator)
    k = torch.randn(2, 2, seq_len, 3, generator=generator)
    lists, starts = chosen_blocks(pattern, q, k, block)
    assert starts.shape == (seq_len, 2, 4, topk)
    positions = torch.arange(seq_len)
    rows = -(-seq_len // block)
    for row in range(2):
        visible = pattern.visible(positions, seq_len, heads=4, q=q[row], k=k[row])
        for head in range(4):
            wanted = by_blocks(visible[head], block).flatten(2).any(-1)
            found = listed_blocks(lists.counts[row, head], lists.blocks[row, head], rows)
            assert torch.equal(found & torch.ones(rows, rows).tril().bool(), found)
            assert (found | ~wanted).all()
            # A chosen block is seen whole, an own one up to the query: nothing superfluous.
            assert torch.equal(found, wanted)
            step = positions - starts[:, row, head, :, None]
            inside = ((step >= 0) & (step < size)).any(1) & (positions <= positions[:, None])
            assert torch.equal(inside, visible[head])


def test_choosing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 2, 100, 4), torch.randn(1, 1, 100, 4)
    whole, starts = chosen_blocks(MoBA(7, 3), q, k, 8)
    monkeypatch.setitem(flex_blocks._SCORE_ELEMENTS, "cpu", 1)
    pieces, again = chosen_blocks(MoBA(7, 3), q, k, 8)
    assert torch.equal(whole.counts, pieces.counts) and torch.equal(whole.blocks, pieces.blocks)
    assert torch.equal(starts, again)


@settings(max_examples=200, deadline=None)
@given(seq_len=LENGTHS, window=st.integers(1, 100), block=BLOCKS)
def test_lists_keep_their_entries_in_the_form_flexattention_takes(
    seq_len: int, window: int, block: int
) -> None:
    lists = window_blocks(seq_len, window, block)
    rows = len(lists.counts)
    counts, blocks = listed(lists.counts, lists.blocks)
    assert counts.shape == (1, 1, max(2, rows)) and blocks.shape == (
        1,
        1,
        max(2, rows),
        max(2, rows),
    )
    assert not counts[..., rows:].any()
    before = listed_blocks(lists.counts, lists.blocks, max(2, rows))
    after = listed_blocks(counts[0, 0], blocks[0, 0], max(2, rows))
    assert torch.equal(before, after[:rows])
    # Read through strides, the list stays in its own memory; a special stride would be compiled in.
    assert blocks.untyped_storage().nbytes() == 4 * (blocks.stride(2) + 1) * max(2, rows)
    assert blocks.stride(2) not in (0, 1, blocks.shape[3])
    assert blocks.stride(2) <= max(2, lists.blocks.shape[1]) + 1


def test_lists_of_a_long_sequence_hold_n_times_w_over_block_squared_entries() -> None:
    seq_len, window, block = 1 << 17, 256, 128
    rows = seq_len // block
    for lists in (
        window_blocks(seq_len, window, block),
        ring_blocks(seq_len, window - 1, True, block),
    ):
        entries = sum(
            listed(counts, blocks)[1].untyped_storage().nbytes() // 4
            for counts, blocks in (
                (lists.counts, lists.blocks),
                (lists.full_counts, lists.full_blocks),
            )
            if counts is not None and blocks is not None
        )
        assert entries <= rows * (2 * window // block + 8) < rows * rows / 50


def test_gradients_can_walk_the_lists_from_the_keys_side() -> None:
    """torch transposes the lists itself; the overlapping view must not confuse it."""
    lists = window_blocks(900, 150, 64)
    assert lists.full_counts is not None and lists.full_blocks is not None
    mask = BlockMask.from_kv_blocks(
        *listed(lists.counts, lists.blocks),
        *listed(lists.full_counts, lists.full_blocks),
        BLOCK_SIZE=64,
        seq_lengths=(900, 900),
    )
    assert mask.q_num_blocks is not None and mask.q_indices is not None
    assert mask.full_q_num_blocks is not None and mask.full_q_indices is not None
    rows = len(lists.counts)
    for counts, blocks, q_counts, q_blocks in (
        (lists.counts, lists.blocks, mask.q_num_blocks, mask.q_indices),
        (lists.full_counts, lists.full_blocks, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        forward = listed_blocks(counts, blocks, rows)
        assert torch.equal(listed_blocks(q_counts[0, 0], q_blocks[0, 0], rows), forward.T)
