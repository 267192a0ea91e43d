"""The block lists of backend `flex`, against the visible pairs themselves, in plain torch.

Not compiled, and exhaustive over pairs: what a list leaves out, no kernel would ever see.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sa_patch.kernels.flex.blocks import BlockLists, listed, ring_blocks, window_blocks

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
@given(
    seq_len=LENGTHS,
    window=st.integers(1, 100),
    block=BLOCKS,
    sinks=st.one_of(st.just(0), st.integers(1, 40)),
)
def test_window_lists_are_exactly_the_blocks_with_a_visible_pair(
    seq_len: int, window: int, block: int, sinks: int
) -> None:
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)
    visible = (j <= i) & ((i - j < window) | (j < sinks))
    lists = window_blocks(seq_len, window, block, sinks)
    rows = lists.columns
    assert rows == -(-seq_len // block)
    partial = listed_blocks(lists.counts, lists.blocks, rows)
    full = check_full_blocks(lists, visible, block)
    assert not (partial & full).any(), "a block counted twice enters the softmax twice"
    assert torch.equal(partial | full, by_blocks(visible, block).flatten(2).any(-1))
    # The mask is tested only at the two edges of the band, and in sinks.
    assert lists.blocks.shape[1] <= 3 + -(-sinks // block)
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


@settings(max_examples=200, deadline=None)
@given(seq_len=LENGTHS, window=st.integers(1, 100), block=BLOCKS, more=st.integers(0, 3))
def test_lists_keep_their_entries_in_the_form_flexattention_takes(
    seq_len: int, window: int, block: int, more: int
) -> None:
    lists = window_blocks(seq_len, window, block)
    rows, columns = max(2, len(lists.counts)), max(2, lists.columns + more)
    counts, blocks = listed(lists.counts, lists.blocks, lists.columns + more)
    assert counts.shape == (1, 1, rows) and blocks.shape == (1, 1, rows, columns)
    assert not counts[..., len(lists.counts) :].any()
    before = listed_blocks(lists.counts, lists.blocks, columns)
    after = listed_blocks(counts[0, 0], blocks[0, 0], columns)
    assert torch.equal(before, after[: len(before)])
    # Read through strides, the list stays in its own memory; a special stride would be compiled in.
    assert blocks.untyped_storage().nbytes() == 4 * (blocks.stride(2) * rows + columns)
    assert blocks.stride(2) not in (0, 1, columns)
    assert blocks.stride(2) <= max(2, lists.blocks.shape[1]) + 1


def test_lists_of_several_heads_stay_apart() -> None:
    heads = [window_blocks(300, window, 16) for window in (20, 70, 33)]
    width = max(lists.blocks.shape[1] for lists in heads)
    counts = torch.stack([lists.counts for lists in heads])
    blocks = torch.stack(
        [torch.nn.functional.pad(x.blocks, (0, width - x.blocks.shape[1])) for x in heads]
    )
    many_counts, many = listed(counts, blocks, 25)
    assert many_counts.shape == (1, 3, 19) and many.shape == (1, 3, 19, 25)
    for head, lists in enumerate(heads):
        alone = listed_blocks(lists.counts, lists.blocks, 25)
        assert torch.equal(listed_blocks(many_counts[0, head], many[0, head], 25), alone)
    dense_counts, dense = listed(counts[None], blocks[None], 19)
    assert dense.shape == (1, 3, 19, 19) and dense.is_contiguous()
    assert torch.equal(dense_counts[0], counts)


@settings(max_examples=100, deadline=None)
@given(seq_len=LENGTHS, reach=st.integers(0, 60), block=BLOCKS)
def test_a_block_can_be_added_to_every_row(seq_len: int, reach: int, block: int) -> None:
    lists = ring_blocks(seq_len, reach, True, block)
    grown = lists.with_block(lists.columns)
    before = listed_blocks(lists.counts, lists.blocks, lists.columns)
    after = listed_blocks(grown.counts, grown.blocks, grown.columns)
    assert grown.columns == lists.columns + 1
    assert torch.equal(after[:, :-1], before) and after[:, -1].all()


def test_lists_of_a_long_sequence_hold_n_times_w_over_block_squared_entries() -> None:
    seq_len, window, block = 1 << 17, 256, 128
    rows = seq_len // block
    for lists in (
        window_blocks(seq_len, window, block),
        ring_blocks(seq_len, window - 1, True, block),
    ):
        entries = sum(
            listed(counts, blocks, rows)[1].untyped_storage().nbytes() // 4
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
        *listed(lists.counts, lists.blocks, lists.columns),
        *listed(lists.full_counts, lists.full_blocks, lists.columns),
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
