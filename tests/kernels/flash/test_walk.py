"""Every pattern as block plans in passes, walked in plain torch, against `reference`.

It is what backend `flash` hands to FlashAttention-4, with all but the kernel: order, lists, mask,
folded heads, passes and their joining.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels import forget_plans, reference
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.dense_tail import with_tail
from sa_patch.kernels.flash import paged
from sa_patch.kernels.flash.paged import paged_keys
from sa_patch.kernels.flash.rows import sequences_as_rows
from sa_patch.kernels.flash.walk import Kernel, MaskKind, walk_rows
from sa_patch.kernels.local_window import LocalWindow
from sa_patch.kernels.plans.block_lists import Blocks, Lists
from sa_patch.kernels.plans.mask import mask_function
from sa_patch.kernels.plans.pages import PagedPlan, paged_part, paged_plan
from sa_patch.kernels.plans.plan import passes
from sa_patch.patterns import BlockTopK, Pattern, parse_pattern, split_tail
from tests.block_walk import PAGES_READ, read_pages, walk
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
    "block_topk:8,1,8,branch=0,shared=32,segment=64,percent=20",
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
        return walk_rows(
            pattern, q, k, v, **given, blocks=blocks, kernel=Kernel(walked, read_pages)
        )

    whole = Backend("walked", "", lambda pattern, q, k: (True, ""), attend)
    return with_tail(whole, fallback=whole)


def inputs(
    n: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, head_dim: int = 12
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(
        torch.randn(batch, h, n, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads)
    )


def worst(
    pattern: Pattern,
    tensors: tuple[Tensor, ...],
    spans: Spans,
    blocks: Blocks,
    softmax: Softmax = PLAIN,
) -> float:
    """Largest difference from `reference` at real queries."""
    # Dispatch scales queries of which a choice weighs the scores.
    scale = tensors[0].shape[3] ** -0.5 if pattern.weighs_scores else 0.3
    given: dict[str, Any] = {"layer": LAYER, "spans": spans, "scale": scale, "softmax": softmax}
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


SHARED = (
    "block_topk:16,2,shared=32",
    "block_topk:32,2,4,shared=64,segment=0",
    "block_topk:8,1,8,branch=0,shared=32,segment=64,percent=20",
    "block_topk:8,4,8,branch=0,shared=32,segment=64,threshold=0.1",
    "block_topk:24,1,7,48,branch=0,shared=64",
    "moba:16,3,shared=32,grouped=true",
    "sinks:21+swa:45+block_topk:16,2,shared=32",
    "sinks:4+sa:30+block_topk:16,2,shared=32",
)


@pytest.mark.parametrize("text", SHARED)
def test_tiles_read_their_shared_blocks_as_pages(text: str) -> None:
    pattern = parse_pattern(text)
    # A threshold is refused where heads must be padded.
    head_dim = 16 if pattern.weighs_scores else 12
    PAGES_READ.clear()
    for n in unless_thorough((1, 129, 200), (1, 127, 128, 129, 300, 1000)):
        for blocks in unless_thorough(BLOCKS[:1], BLOCKS):
            assert (
                worst(pattern, inputs(n, batch=1, head_dim=head_dim), whole(n, 1), blocks)
                <= TOLERANCE
            ), n
    spans = Spans((150, 61), (0, 0))
    assert worst(pattern, inputs(150, 8, 2, head_dim=head_dim), spans, BLOCKS[2]) <= TOLERANCE
    assert PAGES_READ, "walked by lists"


def test_pages_are_views_of_keys_in_any_layout() -> None:
    """A tile reads what it chose, not the sequence; models have tokens before heads in memory."""
    pattern = parse_pattern("block_topk:16,2,shared=32")
    q, k, v = inputs(1000, batch=1)
    PAGES_READ.clear()
    assert worst(pattern, (q, k, v), whole(1000, 1), BLOCKS[0]) <= TOLERANCE
    assert PAGES_READ[0] < 0.75 * 1000
    before = [torch.nn.functional.pad(x, (0, 4)) for x in inputs(200)]
    behind = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in before]
    cached = [torch.nn.functional.pad(x, (0, 0, 0, 56))[:, :, :200] for x in before]
    for q, k, v in (behind, cached, (before[0], before[1], behind[2])):
        assert worst(pattern, (q, k, v), whole(200), BLOCKS[0]) <= TOLERANCE
    (given,) = passes(pattern)
    part = paged_part(given, 200, 200)
    assert part is not None
    plan = paged_plan(given.local, part, *behind[:2], step=128)
    keys, _, _ = paged_keys(behind[1], behind[2], plan)
    assert keys.data_ptr() == behind[1].data_ptr()


@pytest.mark.parametrize("start", [0, 128])
def test_choices_that_grow_are_made_for_some_queries_at_a_time(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = parse_pattern("block_topk:8,1,8,branch=0,shared=32,segment=64,percent=20")
    assert isinstance(pattern, BlockTopK)
    # Two rows, two KV heads and two tiles of 32.
    held = 2 * 2 * 64 * pattern.most_picks(300)
    made = []

    def spy(local: LocalWindow, part: BlockTopK, q: Tensor, k: Tensor, **more: int) -> PagedPlan:
        made.append((q.shape[2], k.shape[2]))
        return paged_plan(local, part, q, k, **more)

    monkeypatch.setattr(paged, "paged_plan", spy)
    monkeypatch.setattr(paged, "CHOICES", held)
    q, k, v = inputs(300, 8, 2)
    rows = Spans((300, 300), (start, start))
    assert worst(pattern, (q[:, :, start:], k, v), rows, BLOCKS[0]) <= TOLERANCE
    ends = [*range(start + 64, 300, 64), 300]
    assert made == [(end - low, end) for low, end in zip(range(start, 300, 64), ends, strict=True)]


def test_the_first_queries_of_a_part_have_a_page_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = parse_pattern("block_topk:40,1,40,branch=0,shared=16,segment=80,percent=20")
    monkeypatch.setattr(paged, "CHOICES", 1)
    PAGES_READ.clear()
    assert worst(pattern, inputs(300, 8, 2), whole(300), BLOCKS[0]) <= TOLERANCE
    assert len(PAGES_READ) > 1


@pytest.mark.parametrize("text", [*PATTERNS[1:], "block_topk:4,50,4,16", "shared_topk"])
def test_nothing_asks_the_device(text: str) -> None:
    """Tensors of the device `meta` hold no numbers to wait for: a question to them is an error."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    pattern = parse_pattern(text.replace("{}", "40"))
    forget_plans()
    for n, start in ((5000, 0), (5000, 4096)):
        q, k, v = (
            torch.empty(2, heads, count, 16, dtype=torch.bfloat16, device="meta")
            for heads, count in ((8, n - start), (2, n), (2, n))
        )
        if start and not stable(text):
            continue
        out = walk_rows(
            split_tail(pattern)[0],
            q,
            k,
            v,
            layer=LAYER,
            spans=Spans((n, n), (start, start)),
            scale=1.0,
            blocks=BLOCKS[0],
            kernel=Kernel(kernel, kernel),
        )
        assert out.shape == q.shape


@pytest.mark.parametrize("text", PATTERNS)
def test_packed_rows_are_rows_of_a_batch(text: str) -> None:
    """Each sequence as if alone; those of about one length together where that changes nothing."""
    pattern, _ = split_tail(parse_pattern(text.replace("{}", "20")))
    q, k, v = inputs(300)
    spans = Spans.packed([[37, 5, 200, 58], [140, 1, 159]])
    given: dict[str, Any] = {"layer": LAYER, "scale": 0.3}
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        calls.append(spans.lengths)
        return backend(BLOCKS[0]).attend(pattern, q, k, v, spans=spans, **given)

    out = sequences_as_rows(pattern, q, k, v, spans, attend)
    parts = [
        reference.BACKEND.attend(pattern, *one, spans=whole(one[0].shape[2], 1), **given)
        for one in spans.sequences(q, k, v)
    ]
    truth = torch.cat([torch.cat(parts[:4], dim=2), torch.cat(parts[4:], dim=2)])
    assert (out - truth).abs().max() <= TOLERANCE
    assert sorted(map(sorted, calls)) == (
        [[1, 5, 37, 58], [140, 159, 200]]
        if pattern.prefix_stable
        else [[1], [5], [37], [58], [140], [159], [200]]
    )
