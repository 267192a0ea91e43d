"""Patterns of the rivals' methods for the laws: small ones over a grid, and a saturating one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sa_patch.patterns import (
    RIVALS,
    FlashPrefill,
    FlexPrefill,
    Pattern,
    PermutedBlocks,
    Power,
    Prism,
    SkipSoftmax,
    Sparge,
    VerticalSlash,
    XAttention,
)
from tests import oracle, rival_oracle
from tests.laws.strategies import Case
from tests.oracle import OracleResult


@dataclass(frozen=True)
class Examples:
    """Patterns of one method; all of `grid` hide something at 40 tokens."""

    grid: tuple[Pattern, ...]
    saturating: Callable[[int], Pattern]


EXAMPLES: dict[str, Examples] = {
    "power": Examples((Power(1), Power(5), Power(3, 4)), lambda n: Power(n)),
    "vertical_slash": Examples(
        (
            VerticalSlash(2, 3, last=5, sinks=1, local=1, block_size=1),
            VerticalSlash(4, 1, last=9, sinks=1, block_size=3),
            VerticalSlash(3, 4, last=8, sinks=0, local=2, block_size=8),
        ),
        lambda n: VerticalSlash(n, 1),
    ),
    "xattention": Examples(
        (
            XAttention(4, topk=3, stride=2),
            XAttention(6, topk=4, stride=3),
            XAttention(8, threshold=0.8, stride=1),
            XAttention(4, threshold=0.7, stride=4),
        ),
        lambda n: XAttention(4, topk=-(-n // 4), stride=2),
    ),
    "skip_softmax": Examples(
        (SkipSoftmax(30.0, 3), SkipSoftmax(1e20, 5), SkipSoftmax(20.0, 4)),
        lambda n: SkipSoftmax(1.0, n),
    ),
    "flexprefill": Examples(
        (
            FlexPrefill(0.7, 4, tau=0.0),
            FlexPrefill(0.6, 3, tau=1.0),
            FlexPrefill(0.5, 4, tau=0.2, minimum=3),
        ),
        lambda n: FlexPrefill(0.9, -(-n // 2)),
    ),
    "sparge": Examples(
        (Sparge(0.5, 3, rows=3, similarity=0.3), Sparge(0.5, 2, similarity=-1.0)),
        lambda n: Sparge(0.9, n),
    ),
    "permuted_blocks": Examples(
        (
            PermutedBlocks(2, topk=3, segment=6),
            PermutedBlocks(4, threshold=0.5),
            PermutedBlocks(3, topk=1, segment=9),
        ),
        lambda n: PermutedBlocks(n, topk=1),
    ),
    "prism": Examples(
        (Prism(0.5, 4), Prism(0.4, 3, high=1.0, low=0.25)),
        lambda n: Prism(0.9, -(-n // 2)),
    ),
    "flashprefill": Examples(
        (
            FlashPrefill(0.8, 4, sinks=0, local=1, last=0),
            FlashPrefill(0.9, 3, sinks=1, local=2, last=1),
        ),
        lambda n: FlashPrefill(0.0),
    ),
}
NAMES: tuple[str, ...] = tuple(cls.name for cls in RIVALS)
PATTERNS: tuple[Pattern, ...] = tuple(p for name in NAMES for p in EXAMPLES[name].grid)
LOOKS_AHEAD: tuple[Pattern, ...] = tuple(p for p in PATTERNS if p.looks_ahead)
COUNTED: tuple[Pattern, ...] = tuple(p for p in PATTERNS if not p.counts_need_content)
CAUSAL: tuple[Pattern, ...] = tuple(p for p in PATTERNS if not p.looks_ahead)


def rival_of_oracle(pattern: Pattern, case: Case) -> OracleResult:
    """The float64 oracle on a case."""
    q, k, v = (x.double().numpy() for x in (case.q, case.k, case.v))
    batch, heads, n, head_dim = q.shape
    scale = head_dim**-0.5 if case.scale is None else case.scale
    arguments = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    result = OracleResult(
        output=torch.zeros(batch, heads, n, v.shape[3], dtype=torch.float64).numpy(),
        visible=torch.zeros(batch, heads, n, n, dtype=torch.bool).numpy(),
        margin=torch.full((batch, heads, n), torch.inf, dtype=torch.float64).numpy(),
    )
    for row, length in enumerate(case.real_tokens()):
        for head in range(heads):
            kv_head = head // (heads // k.shape[1])
            own = q[row, head, :length], k[row, kv_head, :length]
            scored = own[0] * scale * head_dim**0.5, own[1]
            seen = rival_oracle.visible(pattern.name, *scored, arguments)
            for i, keys in enumerate(seen.keys):
                places = sorted(keys)
                result.visible[row, head, i, places] = True
                result.margin[row, head, i] = seen.margin[i]
                result.output[row, head, i] = oracle.softmax_average(
                    own[0][i], own[1][places], v[row, kv_head, places], scale
                )
    return result


def drawn(name: str, rng: random.Random) -> Pattern:
    """Any small pattern of a method."""

    def whole(low: int, high: int) -> int:
        return rng.randint(low, high)

    def share(low: float = 0.05) -> float:
        return round(rng.uniform(low, 1.0), 3)

    size = whole(1, 7)
    by_topk = rng.random() < 0.5
    if name == "power":
        return Power(whole(1, 12), size)
    if name == "vertical_slash":
        vertical, slash = whole(1, 9), whole(1, 9)
        certain = {"sinks": whole(0, vertical), "local": whole(1, slash)}
        return VerticalSlash(vertical, slash, whole(1, 12), block_size=size, **certain)
    if name == "xattention":
        stride = whole(1, 3)
        choice = {"topk": whole(2, 5)} if by_topk else {"threshold": share()}
        return XAttention(stride * whole(1, 3), stride=stride, **choice)
    if name == "skip_softmax":
        return SkipSoftmax(10 ** rng.uniform(-1, 2), size)
    if name == "flexprefill":
        return FlexPrefill(share(), size, tau=rng.choice([0.0, 0.1, 0.2, 1.0]), minimum=whole(1, 3))
    if name == "sparge":
        return Sparge(share(), size, rows=size * whole(1, 3), similarity=rng.uniform(-0.2, 0.6))
    if name == "permuted_blocks":
        choice = {"topk": whole(1, 4)} if by_topk else {"threshold": share()}
        return PermutedBlocks(size, segment=size * whole(1, 3), **choice)
    if name == "prism":
        return Prism(share(), size, high=share(0.2), low=share(0.2))
    if name == "flashprefill":
        return FlashPrefill(share(0.0), size, whole(0, 2), whole(1, 3), whole(0, 2))
    raise AssertionError(f"teach tests/laws/rivals.py to draw patterns of {name!r}")
