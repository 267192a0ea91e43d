"""Small chosen blocks and unions on the Triton kernels, interpreted: no key twice, none lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.backend import Spans
from sa_patch.kernels.triton import backend as triton_backend
from sa_patch.kernels.triton.launch import Call
from sa_patch.kernels.triton.launch_table import BandConfig, MobaConfig, SmallBlocksConfig
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, MoBA, Pattern, Sinks
from tests.kernels.triton.test_triton import FP32_TOLERANCE, TINY, oracle_lse, sdpa_error
from tests.laws.strategies import Case, make_case
from tests.thorough import unless_thorough

pytest.importorskip("triton")

CONFIGS = (BandConfig(TINY, tiles=3), MobaConfig(TINY, TINY, TINY), SmallBlocksConfig(TINY))
# Every kind of piece after every other that it has to leave out, and each alone.
PATTERNS = [
    Sinks(4),
    Sinks(20) | SWA(9),
    BlockTopK(2, 3),
    BlockTopK(3, 4, sinks=0, local=3, branch=2, beam=2),
    BlockTopK(5, 2, sinks=1, local=0, branch=0, grouped=True),
    BlockTopK(16, 1, sinks=2, local=0, branch=2),
    Sinks(2) | SWA(9) | SA(6),
    Sinks(2) | PSA(6),
    SA(4) | SA(5, 3, per_head=True) | PSA(4, 2),
    SWA(12) | MoBA(7, 3),
    Sinks(3) | BlockTopK(4, 2, sinks=0, local=0) | PSA(6),
    SA(4, per_head=True) | BlockTopK(16, 2, sinks=4, local=0) | MoBA(5, 2),
    BlockTopK(2, 2, sinks=1, local=0) | BlockTopK(3, 3, sinks=2, local=3) | MoBA(4, 3),
]
# One of each way through the launches, where all would take too long.
FEW = [Sinks(4) | SWA(9), PSA(6), BlockTopK(3, 2), Sinks(2) | PSA(6) | BlockTopK(3, 2) | MoBA(5, 2)]


def run(
    case: Case, pattern: Pattern, starts: list[int] | None = None, layer: int = 2
) -> tuple[Tensor, Tensor]:
    lengths = tuple(case.real_tokens())
    spans = Spans(lengths, tuple(starts or [0] * len(lengths)))
    q, k, v = (t.nan_to_num(0.0) for t in (case.q, case.k, case.v))
    return triton_backend.attend_with_lse(
        pattern, q, k, v, layer=layer, spans=spans, scale=q.shape[3] ** -0.5, configs=CONFIGS
    )


def small_case(**others: object) -> Case:
    """Three tiles of 16 queries and keys, the last one not full."""
    shape: dict[str, object] = {"q_heads": 4, "kv_heads": 2, "seq_len": 40, "head_dim": 16}
    return make_case(**{**shape, "layer": 2, **others})  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", unless_thorough(PATTERNS[1::2], PATTERNS), ids=str)
def test_output_and_log_sum_exp_equal_the_oracle(pattern: Pattern) -> None:
    """In a batch whose last row most of the patterns saturate."""
    case = small_case(batch=3, seq_len=60, lengths=[60, 35, 7], seed=5)
    expected = case.oracle(pattern)
    assert (expected.margin > 1e-4).all(), "choose a seed whose choices are beyond doubt"
    out, lse = run(case, pattern)
    assert (out.double() - torch.from_numpy(expected.output)).abs().max() <= FP32_TOLERANCE
    wanted = oracle_lse(case, expected.visible)
    assert torch.equal(lse.isfinite(), wanted.isfinite())
    real = wanted.isfinite()
    assert (lse.double() - wanted)[real].abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize(
    "pattern, dtype",
    [(FEW[-1], torch.bfloat16), (FEW[-1], torch.float16)],
    ids=str,
)
def test_half_precision_error_is_at_most_twice_that_of_sdpa(
    pattern: Pattern, dtype: torch.dtype
) -> None:
    case = small_case(q_heads=6, kv_heads=3, seq_len=45, head_dim=20, dtype=dtype)
    expected = case.oracle(pattern)
    decided = torch.from_numpy(expected.margin > 1e-4)
    out, _ = run(case, pattern)
    assert out.dtype == dtype
    ours = (out.double() - torch.from_numpy(expected.output)).abs()[decided]
    theirs = sdpa_error(case, expected)[decided]
    assert ours.max() <= 2 * theirs.max() and ours.square().mean() <= 4 * theirs.square().mean()


@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("count", unless_thorough([17], [1, 17]))
def test_last_queries_alone_equal_the_end_of_the_whole(pattern: Pattern, count: int) -> None:
    case = small_case(batch=2, lengths=[40, 23], seed=5)
    whole, whole_lse = run(case, pattern)
    starts = [length - count for length in case.real_tokens()]
    last = [case.q[row, :, first : first + count] for row, first in enumerate(starts)]
    out, lse = run(case.with_tensors(torch.stack(last), case.k, case.v), pattern, starts)
    for row, first in enumerate(starts):
        there = slice(first, first + count)
        assert (out[row] - whole[row, :, there]).abs().max() <= FP32_TOLERANCE
        assert (lse[row] - whole_lse[row, :, there]).abs().max() <= FP32_TOLERANCE


def test_chunks_of_queries_equal_one_shot() -> None:
    """A chunk in the middle of a sequence, with later keys in place that it must not see."""
    pattern = Sinks(2) | PSA(6) | BlockTopK(3, 2)
    case = small_case(seed=5)
    whole, _ = run(case, pattern)
    for first, last in ((0, 13), (13, 21), (21, 40)):
        part = case.with_tensors(case.q[:, :, first:last], case.k[:, :, :last], case.v[:, :, :last])
        spans = Spans((last,), (first,))
        out, _ = triton_backend.attend_with_lse(
            pattern, part.q, part.k, part.v, layer=2, spans=spans, scale=0.25, configs=CONFIGS
        )
        assert (out - whole[:, :, first:last]).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("pattern", [FEW[0], FEW[-1], SWA(3) | SA(5)], ids=str)
def test_outputs_before_a_changed_token_are_bit_identical(pattern: Pattern) -> None:
    case = small_case()
    before, _ = run(case, pattern)
    changed = [t.clone() for t in (case.q, case.k, case.v)]
    for tensor in changed:
        tensor[:, :, 21:] = 20 * torch.randn(tensor[:, :, 21:].shape)
    after, _ = run(case.with_tensors(*changed), pattern)
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


@pytest.mark.parametrize("pattern", unless_thorough(FEW[-1:], FEW), ids=str)
def test_strides_and_uninitialised_memory_do_not_show(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small_case(batch=2, head_dim=20, lengths=[40, 23])
    expected, _ = run(case, pattern)
    views = [
        case.q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([case.k, case.k], -1)[..., 0],
        torch.cat([case.v, case.v], 3)[..., 20:],
    ]
    fill_with_nan(monkeypatch)
    out, _ = run(case.with_tensors(*views), pattern)
    assert torch.equal(out, expected)
    assert torch.equal(out[1, :, 23:], torch.zeros_like(out[1, :, 23:]))


def fill_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty returns from now on."""

    def filled(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor = real(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    assert torch.isnan(torch.empty(2)).all()


@pytest.mark.parametrize("pattern", unless_thorough(FEW[-1:], FEW), ids=str)
def test_nothing_beyond_the_last_row_is_read(pattern: Pattern) -> None:
    case = small_case(seq_len=43)
    expected, _ = run(case, pattern)
    q, k, v = (
        torch.nn.functional.pad(t, (0, 0, 0, 40), value=torch.nan)[:, :, :43]
        for t in (case.q, case.k, case.v)
    )
    out, _ = triton_backend.attend_with_lse(
        pattern, q, k, v, layer=2, spans=Spans((43,), (0,)), scale=16**-0.5, configs=CONFIGS
    )
    assert torch.equal(out, expected)


def test_kv_heads_in_turns_leave_out_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_patch.kernels.triton import chosen_blocks_launch as triton_chosen_launch

    pattern = SA(4, per_head=True) | MoBA(5, 2) | BlockTopK(16, 2, sinks=4, local=0)
    case = small_case(batch=2, lengths=[40, 27])
    out, lse = run(case, pattern)
    monkeypatch.setattr(triton_chosen_launch, "PARTIAL_BYTES", 1)
    out_in_turns, lse_in_turns = run(case, pattern)
    assert torch.equal(out, out_in_turns) and torch.equal(lse, lse_in_turns)


def test_queries_in_turns_leave_out_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the partial results of one KV head are too many, as where choices grow with n."""
    from sa_patch.kernels.triton import chosen_blocks_launch as triton_chosen_launch

    union = SA(4, per_head=True) | MoBA(5, 2) | BlockTopK(16, 2, sinks=4, local=0)
    for pattern in (union, BlockTopK(16, 1, 4, 0, branch=0, percent=50)):
        case = small_case(batch=2, seq_len=70, lengths=[70, 27])
        out, lse = run(case, pattern)
        queries = []
        attend_choices = triton_chosen_launch.attend_choices

        def counted(call: Call, *args: Any, attend: Any = attend_choices) -> object:
            queries.append(call.q.shape[2])  # noqa: B023
            return attend(call, *args)

        with monkeypatch.context() as small:
            small.setattr(triton_chosen_launch, "PARTIAL_BYTES", 1)
            small.setattr(triton_chosen_launch, "_QUERIES", 32)
            small.setattr(triton_chosen_launch, "attend_choices", counted)
            out_in_turns, lse_in_turns = run(case, pattern)
        assert set(queries) == {32, 6}
        assert (out - out_in_turns).abs().max() <= FP32_TOLERANCE
        assert (lse - lse_in_turns)[lse.isfinite()].abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("grouped", [False, True])
def test_gathering_and_sorting_agree(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_patch.kernels.triton import parts as triton_pieces

    pattern = BlockTopK(5, 3, sinks=3, local=5, grouped=grouped) | SWA(17) | PSA(4, per_head=True)
    case = small_case(q_heads=6, seq_len=60, seed=5)
    gathered, lse = run(case, pattern)
    monkeypatch.setattr(triton_pieces, "_SORTED_BLOCK", 1)
    by_block, lse_by_block = run(case, pattern)
    assert not torch.equal(gathered, by_block), "they are two ways"
    assert (gathered - by_block).abs().max() <= FP32_TOLERANCE
    assert (lse - lse_by_block).abs().max() <= FP32_TOLERANCE


def test_scores_far_from_zero_join_without_overflow() -> None:
    case = small_case()
    large = case.with_tensors(60 * case.q, case.k, case.v)
    for pattern in (Sinks(2) | PSA(6), SWA(5) | BlockTopK(3, 2)):
        expected = large.oracle(pattern)
        decided = torch.from_numpy(expected.margin > 1e-2)
        assert decided.float().mean() > 0.9
        out, lse = run(large, pattern)
        assert lse.max() > 150
        difference = (out.double() - torch.from_numpy(expected.output)).abs()
        # Scores of hundreds are rounded to about 1e-5.
        assert difference[decided].max() <= 100 * FP32_TOLERANCE
