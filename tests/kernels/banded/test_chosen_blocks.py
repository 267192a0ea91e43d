"""Chosen blocks as a piece of a union: against a dense mask in float64, on both ways there are.

Small blocks on a CPU without gradients are read where they lie; everything else goes by tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.kernels import sparse_attention
from sa_patch.kernels.banded import choices, union
from sa_patch.kernels.banded import chosen_blocks as banded_blocks
from sa_patch.kernels.banded.choices import choose, chosen_rule
from sa_patch.kernels.banded.chosen_blocks import attend_blocks, attend_chosen
from sa_patch.kernels.local_window import LocalWindow
from sa_patch.kernels.merge import merge
from sa_patch.patterns import PSA, SWA, BlockTopK, MoBA, Pattern, Sinks
from tests.laws.strategies import make_case

TOLERANCE = 1e-5
SCALE = 0.4
HEADS, KV_HEADS = 6, 2
WAYS = {"leaves": 64, "tiles": 0}

RULES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "nothing": None,
    "the nearest and the first": lambda i, j: (j < 3) | (i - j < 7),
    "other keys for each head": lambda i, j: (j + torch.arange(HEADS)[:, None, None]) % 3 == 0,
    "everything": lambda i, j: j >= 0,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(banded_blocks, "_LARGEST_LEAF", WAYS[request.param])
    return str(request.param)


def dense_mask(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor, start: int) -> Tensor:
    """What a row chooses, from the pattern's definition: bool [q_heads, nq, n]."""
    n = k.shape[1]
    positions = torch.arange(start, start + q.shape[1])
    visible = pattern.visible(positions, n, heads=len(q), q=q, k=k)
    if isinstance(pattern, BlockTopK):
        return visible & ~pattern.unchosen(positions, n)
    own = positions[:, None] // pattern.block_size
    return visible & (torch.arange(n) // pattern.block_size != own)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked attention in float64: q [batch, q_heads, nq, d], mask [batch, q_heads, nq, n]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ keys.transpose(2, 3) * SCALE).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.clamp(min=-1e300)[..., None]).exp() @ values, lse


def inputs(n: int, queries: int, head_dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    case = make_case(
        batch=2, q_heads=HEADS, kv_heads=KV_HEADS, seq_len=n, head_dim=head_dim, seed=seed
    )
    return case.q[:, :, n - queries :], case.k, case.v


@st.composite
def chosen_patterns(draw: st.DrawFn) -> MoBA | BlockTopK:
    if draw(st.booleans()):
        return MoBA(draw(st.integers(1, 9)), draw(st.integers(1, 5)))
    return BlockTopK(
        size := draw(st.integers(1, 5)),
        topk=draw(st.integers(0, 6)),
        sinks=draw(st.integers(0, 5)),
        local=size * draw(st.integers(0, 2)),
        branch=draw(st.sampled_from([0, 2, 8])),
        beam=draw(st.integers(3, 8)),
        grouped=draw(st.booleans()),
    )


@pytest.mark.parametrize("largest_leaf", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("hidden", RULES)
@given(
    pattern=chosen_patterns(),
    n=st.integers(1, 60),
    share=st.floats(0, 1),
    head_dim=st.sampled_from([1, 4, 12]),
    seed=st.integers(0, 2**20),
)
def test_chosen_keys_alone_equal_a_dense_mask(
    largest_leaf: int,
    hidden: str,
    pattern: MoBA | BlockTopK,
    n: int,
    share: float,
    head_dim: int,
    seed: int,
) -> None:
    q, k, v = inputs(n, 1 + int(share * (n - 1)), head_dim, seed)
    start, unless = n - q.shape[2], RULES[hidden]
    mask = torch.stack([dense_mask(pattern, q[row], k[row], start) for row in range(2)])
    if unless is not None:
        positions = torch.arange(start, n)[None, :, None]
        mask = mask & ~unless(positions, torch.arange(n)[None, None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banded_blocks, "_LARGEST_LEAF", largest_leaf)
        out, lse = attend_chosen(pattern, q, k, v, start=start, scale=SCALE, unless=unless)
    right, right_lse = expected(q, k, v, mask)
    seen = mask.any(-1)
    assert torch.equal(lse > -torch.inf, seen)
    assert torch.isfinite(out).all()
    assert not seen.any() or (out - right)[seen].abs().max() <= TOLERANCE
    assert not seen.any() or (lse - right_lse)[seen].abs().max() <= TOLERANCE


@pytest.mark.parametrize("pattern", [MoBA(5, 3), BlockTopK(4, 5, branch=2, beam=3)], ids=str)
def test_picks_that_are_known_are_taken(pattern: MoBA | BlockTopK, way: str) -> None:
    q, k, v = inputs(70, 50, 8, seed=3)
    picks = torch.stack([choose(pattern, q[row], k[row], 20) for row in range(2)])
    assert picks.shape[:3] == (2, HEADS, 50)
    options = {"start": 20, "scale": SCALE}
    ours = attend_chosen(pattern, q, k, v, picks=picks, **options)  # type: ignore[arg-type]
    theirs = attend_chosen(pattern, q, k, v, **options)  # type: ignore[arg-type]
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    fewer = picks.clone()
    fewer[..., 0] = -1
    assert not torch.equal(attend_chosen(pattern, q, k, v, picks=fewer, **options)[0], ours[0])  # type: ignore[arg-type]


@given(pattern=chosen_patterns(), n=st.integers(2, 60), seed=st.integers(0, 2**20))
def test_the_rule_of_a_choice_names_what_it_chose(
    pattern: MoBA | BlockTopK, n: int, seed: int
) -> None:
    q, k, _ = inputs(n, n - n // 3, 8, seed)
    start = n // 3
    rule = chosen_rule(pattern, choose(pattern, q[0], k[0], start), start)
    i, j = torch.arange(start, n)[None, :, None], torch.arange(n)[None, None]
    chosen = dense_mask(pattern, q[0], k[0], start)
    assert torch.equal((rule(i, j) & (j <= i)).expand_as(chosen), chosen)
    # Any pairs, in any order, for each head its own.
    generator = torch.Generator().manual_seed(seed)
    some_i = torch.randint(start, n, (HEADS, 30), generator=generator)
    some_j = (some_i * torch.rand(HEADS, 30, generator=generator)).long()
    heads = torch.arange(HEADS)[:, None]
    named = rule(some_i, some_j).expand(HEADS, 30)
    assert torch.equal(named, chosen[heads, some_i - start, some_j])


def test_of_two_choices_the_second_hides_what_the_first_shows(way: str) -> None:
    first, second, n = MoBA(6, 3), BlockTopK(2, 5, sinks=3, local=2, branch=2, beam=3), 80
    q, k, v = (x[:1] for x in inputs(n, n, 8, seed=11))
    picks = choose(first, q[0], k[0], 0)
    options = {"start": 0, "scale": SCALE}
    own = attend_chosen(first, q, k, v, picks=picks[None], **options)  # type: ignore[arg-type]
    rest = attend_chosen(second, q, k, v, unless=chosen_rule(first, picks, 0), **options)  # type: ignore[arg-type]
    masks = [dense_mask(pattern, q[0], k[0], 0) for pattern in (first, second)]
    assert (masks[0] & masks[1]).any(), "the two must have keys in common"
    either = (masks[0] | masks[1])[None]
    right, _ = expected(q, k, v, either)
    seen = either.any(-1)
    assert (merge([own, rest]) - right)[seen].abs().max() <= TOLERANCE
    assert not merge([own, rest])[~seen].any()


@pytest.mark.parametrize("poison", [9.0, torch.nan, torch.inf])
@pytest.mark.parametrize(
    "pattern", [MoBA(8, 3), MoBA(3, 4), BlockTopK(4, 5, branch=2, beam=3)], ids=str
)
def test_no_bit_depends_on_later_tokens(pattern: MoBA | BlockTopK, poison: float, way: str) -> None:
    n = 200
    q, k, v = inputs(n, n, 8, seed=2)
    before = attend_chosen(pattern, q, k, v, start=0, scale=SCALE)
    for changed in (3, 64, 131, 199):
        tensors = [x.clone() for x in (q, k, v)]
        for x in tensors:
            x[:, :, changed:] = -x[:, :, changed:] * poison
        after = attend_chosen(pattern, *tensors, start=0, scale=SCALE)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, :, :changed], new[:, :, :changed])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [MoBA(8, 3), BlockTopK(4, 5, beam=3)], ids=str)
def test_half_precision_is_summed_in_fp32(
    pattern: MoBA | BlockTopK, dtype: torch.dtype, way: str
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(120, 120, 16, seed=4))
    out, lse = attend_chosen(pattern, q, k, v, start=0, scale=SCALE)
    assert out.dtype == lse.dtype == torch.float32
    mask = torch.stack([dense_mask(pattern, q[row], k[row], 0) for row in range(2)])
    right, right_lse = expected(q, k, v, mask)
    seen = mask.any(-1)
    assert (out - right)[seen].abs().max() <= TOLERANCE
    assert (lse - right_lse)[seen].abs().max() <= TOLERANCE


@pytest.mark.parametrize("hidden", ["nothing", "other keys for each head"])
@pytest.mark.parametrize("pattern", [MoBA(8, 3), BlockTopK(4, 5, beam=3)], ids=str)
def test_gradients_of_outputs_and_sums_are_those_of_a_dense_mask(
    pattern: MoBA | BlockTopK, hidden: str
) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(70, 70, 8, seed=6))
    unless = RULES[hidden]
    mask = torch.stack([dense_mask(pattern, q[row], k[row], 0) for row in range(2)])
    if unless is not None:
        mask = mask & ~unless(torch.arange(70)[None, :, None], torch.arange(70)[None, None])
    seen = mask.any(-1)
    toward = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for out, lse in (
        attend_chosen(pattern, q, k, v, start=0, scale=SCALE, unless=unless),
        expected(q, k, v, mask),
    ):
        goal = (out * toward)[seen].sum() + (lse * toward[..., 0])[seen].sum()
        gradients.append(torch.autograd.grad(goal, (q, k, v)))
    for ours, right in zip(*gradients, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - right).abs().max() <= 1e-4


@pytest.mark.parametrize("block_size, topk", [(1, 9), (3, 4), (16, 3), (50, 2)])
def test_moba_alone_equals_reference_on_both_ways(block_size: int, topk: int, way: str) -> None:
    pattern = MoBA(block_size, topk)
    case = make_case(batch=2, q_heads=HEADS, kv_heads=KV_HEADS, seq_len=170, scale=SCALE, seed=9)
    whole = case.run(pattern, "reference")
    for start in (0, 60, 163):
        q = case.q[:, :, start:]
        out = attend_blocks(pattern, q, case.k, case.v, start=start, scale=SCALE)
        assert (out - whole[:, :, start:]).abs().max() <= TOLERANCE


def test_a_long_choice_is_ranked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = MoBA(4, 4)
    q, k, _ = inputs(150, 120, 8, seed=8)
    whole = choose(pattern, q[0], k[0], 30)
    monkeypatch.setattr(choices, "_RANKED_CPU", 1)
    assert torch.equal(choose(pattern, q[0], k[0], 30), whole)


def test_shared_choices_of_many_queries_are_made_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern = BlockTopK(4, 2, sinks=4, branch=0, shared=8, segment=16, percent=30)
    case = make_case(batch=1, q_heads=HEADS, kv_heads=KV_HEADS, seq_len=150, layer=0, seed=1)
    # Beside a window, so that a part must know its positions.
    window = LocalWindow(6, ((0, 1, 37),))
    inputs: dict[str, Any] = {"start": 0, "scale": SCALE, "beside": window}
    whole = attend_chosen(pattern, case.q, case.k, case.v, **inputs)
    most = pattern.most_picks(150) * pattern.shared * KV_HEADS
    asked: list[int] = []

    def choose_part(self: BlockTopK, q: Tensor, *rest: object) -> Tensor:
        asked.append(q.shape[1])
        return own_choices(self, q, *rest)  # type: ignore[arg-type]

    own_choices = BlockTopK.own_choices
    monkeypatch.setattr(BlockTopK, "own_choices", choose_part)
    monkeypatch.setattr(choices, "CHOSEN", 3 * most)
    parts = attend_chosen(pattern, case.q, case.k, case.v, **inputs)
    assert all(map(torch.equal, whole, parts))
    assert asked == [24] * 6 + [6]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("beside", [Sinks(4), PSA(6), BlockTopK(3, 2)], ids=str)
def test_shared_choices_beside_other_parts_are_held_for_some_queries_at_a_time(
    beside: Pattern, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules that hide keys and soft caps take a list for each query of all that its tile chose."""
    shared = BlockTopK(4, 2, sinks=4, branch=0, shared=8, segment=16, percent=30)
    pattern = SWA(20) | beside | shared
    case = make_case(batch=2, q_heads=HEADS, kv_heads=KV_HEADS, seq_len=150, lengths=[150, 40])
    inputs: dict[str, Any] = {"lengths": case.lengths, "softcap": softcap}
    right = sparse_attention(case.q, case.k, case.v, pattern, backend="reference", **inputs)
    queries: list[int] = []

    def choose_part(
        part: BlockTopK, q: Tensor, k: Tensor, start: int, choose: Any = choose
    ) -> Tensor:
        assert start + q.shape[1] == k.shape[1]
        queries.append(q.shape[1])
        return choose(part, q, k, start)

    for module in (banded_blocks, union):
        monkeypatch.setattr(module, "choose", choose_part)
    monkeypatch.setattr(choices, "_LEAST_QUERIES", 1)
    monkeypatch.setattr(choices, "CHOSEN", 4 * 8 * HEADS * 8 * shared.most_picks(150))
    out = sparse_attention(case.q, case.k, case.v, pattern, backend="banded", **inputs)
    assert (out - right).abs().max() <= TOLERANCE
    # The tiles of shared choices alone are served without such lists.
    assert not queries if beside == Sinks(4) and softcap is None else 150 not in queries
