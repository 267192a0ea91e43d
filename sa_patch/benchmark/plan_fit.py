"""How well block plans fit a card, known without one: what ``sa-patch bench --plan`` prints.

A kernel computes whole blocks of keys, so that a pattern costs the pairs in the blocks it visits,
not the pairs it shows. From these follow FLOPs and bytes, and the least time on an H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.benchmark.options import at_least_one, check_heads
from sa_patch.benchmark.tables import number, table
from sa_patch.errors import UserError
from sa_patch.kernels.flash.attention4 import blocks_for
from sa_patch.kernels.flash.paged import part_by_pages
from sa_patch.kernels.flash.walk import folded
from sa_patch.kernels.plans.block_lists import Blocks
from sa_patch.kernels.plans.pages import paged_plan
from sa_patch.kernels.plans.plan import KINDS, Pass, passes, plan_of
from sa_patch.patterns import Pattern, parse_pattern, parts_of
from sa_patch.patterns.registry import make_pattern

PATTERNS = (
    "full",
    "swa:256",
    "sinks:4+swa:256",
    "sa:256",
    "psa:256",
    "moba:window=256",
    "block_topk:16,16",
    "block_topk:8,8,8,branch=0,shared=32,segment=128",
    "sinks:4+swa:128+psa:128",
)
LENGTHS = (2048, 8192, 32768)
# NVIDIA's data sheet of the H100 SXM: dense bfloat16 products, and memory.
H100_FLOPS, H100_BYTES_PER_S = 989.4e12, 3.35e12
HOPPER = 9
_BYTES = 2  # of a number in bfloat16
# Width of the random heads from which content is chosen: wider ones choose as much.
_CHOICE_WIDTH = 16


@dataclass(frozen=True)
class Model:
    """Heads of the layer that is asked about; Qwen3-8B's.

    Raises:
        UserError: if no layer can have such heads.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __post_init__(self) -> None:
        check_heads(self.heads, self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class PlanFit:
    """What one layer of one sequence costs under a pattern's plan.

    Args:
        visible, visited: pairs that a query head sees in expectation, and those in the blocks that
            its tiles visit.
        whole: share of the visited blocks that are wholly visible, where no mask is computed.
        flops: of all heads, of the visited blocks.
        bytes: that memory has to give and take at least: queries, keys, values, results and lists
            once for each pass, and rows that are put into another order.
    """

    pattern: str
    n: int
    visible: float
    visited: float
    whole: float
    flops: float
    bytes: float

    @property
    def fit(self) -> float:
        """Visible pairs over visited ones."""
        return self.visible / self.visited

    @property
    def floor_ms(self) -> float:
        """On an H100, if it did nothing but these FLOPs or bytes, whichever takes longer."""
        return 1e3 * max(self.flops / H100_FLOPS, self.bytes / H100_BYTES_PER_S)


def plan_fit(pattern: Pattern, n: int, model: Model, *, layer: int = 0) -> PlanFit:
    """Make the plans that FlashAttention-4 would walk on Hopper, and count.

    Patterns that choose by content do so among random keys, where neighbours agree less than in
    text.

    Raises:
        UserError: for a pattern without a plan, or no tokens.
    """
    at_least_one(n, "n")
    if unknown := [part.name for part in parts_of(pattern) if not isinstance(part, KINDS)]:
        raise UserError(f"{unknown[0]} has no block plan; name patterns without it")
    blocks = blocks_for(HOPPER, model.head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, heads, n, _CHOICE_WIDTH, generator=generator)
        for heads in (model.heads, model.kv_heads)
    )
    costs = [_pass_cost(given, q, k, blocks, model, layer) for given in passes(pattern)]
    visited, whole, moved = map(sum, zip(*costs, strict=True))
    return PlanFit(
        str(pattern),
        n,
        float(pattern.keys_per_query(n).sum()),
        visited,
        whole / visited,
        4.0 * visited * model.heads * model.head_dim,
        moved,
    )


def _pass_cost(
    given: Pass, q: Tensor, k: Tensor, blocks: Blocks, model: Model, layer: int
) -> tuple[float, float, float]:
    """Pairs that a query head visits in a pass, those in wholly visible blocks, and bytes moved."""
    group, n = model.heads // model.kv_heads, k.shape[2]
    row_bytes = _BYTES * model.head_dim * n
    rows_bytes = 2 * (model.heads + model.kv_heads) * row_bytes
    if (part := part_by_pages(given, group, n, n, blocks)) is not None:
        paged = paged_plan(given.local, part, q, k, step=blocks.keys)
        # Rows of queries and of the result are put in order, keys and values are not.
        copied = 2 * 2 * model.heads * row_bytes
        visited = _visits(paged.used) * paged.shared
        return visited, 0.0, rows_bytes + copied + _bytes(paged.tables, paged.starts, paged.used)
    fold = folded(given, group, blocks)
    own = blocks._replace(queries=blocks.queries // fold, heads=fold)
    plan = plan_of(given, q, k, layer=layer, blocks=own)
    pairs = own.queries * own.keys
    some, whole = (_visits(x) * pairs for x in (plan.lists.counts, plan.lists.whole_counts))
    copies = 3 if plan.structure.ordered else 1
    kv_heads = model.heads if len(plan.keys) > 1 else model.kv_heads
    moved = copies * 2 * (model.heads + kv_heads) * row_bytes
    return some + whole, whole, moved + _bytes(plan.tables, *plan.lists)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _visits(counts: Tensor) -> float:
    """What all tiles visit, ``[batch, heads, tiles]``: a mean over heads with their own lists."""
    return float(counts.sum((0, 2)).double().mean())


def chosen_patterns(methods: Sequence[str], window: int) -> list[Pattern]:
    """Text forms, or names of methods with this window."""
    return [
        parse_pattern(text) if ":" in text or text == "full" else make_pattern(text, window=window)
        for text in methods
    ]


def plan_table(fits: Sequence[PlanFit]) -> str:
    """A row for each, and what the columns mean."""
    rows = [
        (
            f"{fit.n:,}",
            fit.pattern,
            number(fit.visible / fit.n),
            number(fit.visited / fit.n),
            f"{fit.fit:.2f}",
            f"{fit.whole:.2f}",
            number(fit.flops / 1e9),
            number(fit.bytes / 1e6),
            number(fit.floor_ms),
        )
        for fit in fits
    ]
    return table(
        ">n | pattern | >keys seen | >keys visited | >seen / visited | >whole blocks | >GFLOP "
        "| >MB | >floor on an H100, ms",
        rows,
    )
