"""Every pattern as block plans in passes, walked in plain torch, against `reference`.

It is what backend `flash` hands to FlashAttention-4, with all but the kernel: order, lists, mask,
folded heads, passes and their joining.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels import reference
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.dense_tail import with_tail
from sa_patch.kernels.flash.walk import MaskKind, walk_rows
from sa_patch.kernels.plans.block_lists import Blocks, Lists
from sa_patch.kernels.plans.mask import mask_function
from sa_patch.patterns import Pattern, parse_pattern
from tests.block_walk import walk
from tests.thorough import unless_thorough

TOLERANCE = 1e-5
LAYER = 2
# Of cards 9.x, 10.x, and of wide heads.
BLOCKS = Blocks(128, 128), Blocks(256, 128), Blocks(128, 64)
PATTERNS = (
    "full",
    "swa:{}",
    "sinks:{}",
    "sinks:4+swa:{}",
    "sa:{}",
    "sa:{},circular=false",
    "sa:{},per_head=true",
    "psa:{}",
    "moba:{},3",
    "moba:16,2,shared=4,grouped=true",
    "block_topk:16,3",
    "block_topk:4,3,grouped=false",
    "block_topk:8,2,8,branch=0,shared=32,segment=128",
    "tail:5+sinks:2+swa:{}",
    "sinks:4+swa:{}+psa:{}",
    "sinks:1+sa:{},per_head=true+sa:{},seed=5+moba:16,3",
    "swa:{}+sa:{}+psa:9+moba:32,2+block_topk:8,2",
)

# Those that are tried at n = 1000 by default.
LONG = [text for text in PATTERNS if "sa:" in text]


def stable(text: str) -> bool:
    """Whether prompts may come in pieces."""
    return parse_pattern(text.replace("{}", "20")).prefix_stable


def walked(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, mask: MaskKind, blocks: Blocks, *rest: Any
) -> tuple[Tensor, Tensor]:
    """A kernel: shapes and contents are checked as FlashAttention-4 does."""
    rows = -(-q.shape[2] // blocks.queries)
    for counts, columns in (lists[:2], lists[2:]):
        assert counts.shape[0] in (1, len(q)) and counts.shape[1] in (1, q.shape[1])
        assert counts.shape == columns.shape[:3] and counts.shape[2] == rows
        assert columns.shape[3] <= -(-k.shape[2] // blocks.keys)
        assert counts.dtype == columns.dtype == torch.int32
    seen = mask_function(mask.plan.tables, mask.plan.structure)

    def unfolded(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if mask.fold > 1:
            head, i = batch % mask.kv_heads * mask.fold + i % mask.fold, i // mask.fold
            batch = batch // mask.kv_heads
        return seen(batch, head, i, j)

    return walk(q, k, v, lists, unfolded, blocks, *rest)


def backend(blocks: Blocks) -> Backend:
    def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return walk_rows(pattern, q, k, v, **given, blocks=blocks, kernel=walked)

    whole = Backend("walked", "", lambda pattern, q, k: (True, ""), attend)
    return with_tail(whole, fallback=whole)


def inputs(n: int, heads: int = 4, kv_heads: int = 2, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(
        torch.randn(batch, h, n, 12, generator=generator) for h in (heads, kv_heads, kv_heads)
    )


def worst(
    pattern: Pattern,
    tensors: tuple[Tensor, ...],
    spans: Spans,
    blocks: Blocks,
    softmax: Softmax = PLAIN,
) -> float:
    """Largest difference from `reference` at real queries."""
    given: dict[str, Any] = {"layer": LAYER, "spans": spans, "scale": 0.3, "softmax": softmax}
    found = backend(blocks).attend(pattern, *tensors, **given)
    truth = reference.BACKEND.attend(pattern, *tensors, **given)
    padded = spans.padded_queries(tensors[0].shape[2], truth.device)
    difference = (found - truth).abs()
    if padded is not None:
        difference = difference.masked_fill(padded[:, None, :, None], 0)
    return float(difference.max())


@pytest.mark.parametrize("text", ["sinks:4+swa:40+psa:40", "moba:16,3", "swa:40"])
def test_soft_caps_and_learned_sinks(text: str) -> None:
    tensors = inputs(200)
    own = Softmax(1.5, torch.tensor([-2.0, 0.0, 1.0, 5.0]))
    assert worst(parse_pattern(text), tensors, whole(200), BLOCKS[0], own) <= TOLERANCE


def whole(n: int, batch: int = 2) -> Spans:
    return Spans((n,) * batch, (0,) * batch)


@pytest.mark.parametrize("text", PATTERNS)
def test_equals_reference_at_every_length(text: str) -> None:
    pattern = parse_pattern(text.replace("{}", "40"))
    for number, n in enumerate((1, 127, 128, 129, 300)):
        assert worst(pattern, inputs(n), whole(n), BLOCKS[number % 3]) <= TOLERANCE, n
    if text in unless_thorough(LONG, PATTERNS):
        assert worst(pattern, inputs(1000, batch=1), whole(1000, 1), BLOCKS[0]) <= TOLERANCE


@pytest.mark.parametrize("text", [text for text in PATTERNS if "{}" in text])
def test_windows_from_one_key_to_all(text: str) -> None:
    tensors = inputs(140)
    few = (1, 2, 13, 70, 71, 139, 140)
    for window in unless_thorough(few, range(1, 141)):
        pattern = parse_pattern(text.replace("{}", str(window)))
        assert worst(pattern, tensors, whole(140), BLOCKS[0]) <= TOLERANCE, window


@pytest.mark.parametrize("text", PATTERNS)
def test_padded_rows_and_groups_of_query_heads(text: str) -> None:
    pattern = parse_pattern(text.replace("{}", "20"))
    for heads, kv_heads in ((6, 2), (8, 2), (3, 1), (2, 2)):
        spans = Spans((150, 61, 150), (0, 0, 0))
        tensors = inputs(150, heads, kv_heads, batch=3)
        assert worst(pattern, tensors, spans, BLOCKS[0]) <= TOLERANCE, (heads, kv_heads)


@pytest.mark.parametrize("text", [text for text in PATTERNS if stable(text)])
def test_prompts_in_pieces(text: str) -> None:
    pattern = parse_pattern(text.replace("{}", "20"))
    q, k, v = inputs(300)
    for start in (96, 160):
        last = (q[:, :, start:], k, v)
        assert worst(pattern, last, Spans((300, 300), (start, start)), BLOCKS[0]) <= TOLERANCE
    ragged = Spans((300, 290), (96, 96))
    assert worst(pattern, (q[:, :, 96:], k, v), ragged, BLOCKS[0]) <= TOLERANCE
