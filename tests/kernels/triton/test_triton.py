"""The Triton kernels, interpreted, against the float64 oracle.

Tiles are made small where several of them have to meet: a test that fits one tile shows little.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import Spans
from sa_patch.kernels.triton import backend as triton_backend
from sa_patch.kernels.triton.launch_table import BandConfig, Config, Launch, MobaConfig
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern
from tests.laws.strategies import Case, make_case
from tests.oracle import OracleResult
from tests.thorough import unless_thorough

pytest.importorskip("triton")

FP32_TOLERANCE = 1e-5  # absolute
TINY = Launch(block_m=16, block_n=16)
TINY_BAND = BandConfig(TINY, tiles=4)
TINY_MOBA = MobaConfig(TINY, TINY, TINY)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(
    case: Case, pattern: Pattern, config: Config | None = None, starts: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as the backend gives them for padding of zeros."""
    lengths = case.real_tokens()
    spans = Spans(tuple(lengths), tuple(starts or [0] * len(lengths)))
    tensors = (t.nan_to_num(0.0) for t in (case.q, case.k, case.v))
    scale = case.q.shape[3] ** -0.5 if case.scale is None else case.scale
    return triton_backend.attend_with_lse(
        pattern,
        *tensors,
        layer=case.layer,
        spans=spans,
        scale=scale,
        configs=() if config is None else (config,),
    )


def oracle_lse(case: Case, visible: np.ndarray) -> Tensor:
    """float64 ``[batch, q_heads, n]``, -inf at padding."""
    group = case.q.shape[1] // case.k.shape[1]
    q, k = (t.nan_to_num(0.0).double() for t in (case.q, case.k))
    scale = case.q.shape[3] ** -0.5 if case.scale is None else case.scale
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
    return scores.masked_fill(~torch.from_numpy(visible), -torch.inf).logsumexp(-1)


def assert_matches(case: Case, pattern: Pattern, config: Config | None = None) -> None:
    expected = case.oracle(pattern)
    out, lse = run(case, pattern, config)
    assert out.shape == case.q.shape and out.dtype == case.q.dtype
    assert (out.double() - torch.from_numpy(expected.output)).abs().max() <= FP32_TOLERANCE
    wanted = oracle_lse(case, expected.visible)
    real = wanted.isfinite()
    assert torch.equal(lse.isfinite(), real)
    assert (lse.double() - wanted)[real].abs().max() <= FP32_TOLERANCE


def patterns_for(n: int) -> list[Pattern]:
    third = max(1, n // 3)
    sparse = max(1, n // 8)
    return [
        Full(),
        SWA(1),
        SWA(third),
        SWA(2 * n),
        SA(1),
        SA(sparse, seed=n),
        SA(third, circular=False),
        SA(sparse, per_head=True),
        SA(2 * n),
    ]


@pytest.mark.parametrize(
    "n, head_dim, q_heads, kv_heads",
    [(1, 64, 1, 1), (2, 128, 8, 2), (63, 60, 9, 3), (111, 96, 1, 1), (128, 100, 4, 1)],
)
def test_output_and_log_sum_exp_equal_the_oracle(
    n: int, head_dim: int, q_heads: int, kv_heads: int
) -> None:
    lengths = [n, max(1, n // 3)] if n < 100 else [n]
    for layer, pattern in enumerate(patterns_for(n)):
        case = make_case(
            batch=len(lengths),
            q_heads=q_heads,
            kv_heads=kv_heads,
            seq_len=n,
            head_dim=head_dim,
            lengths=lengths,
            layer=layer,
            seed=n,
        )
        assert_matches(case, pattern)


@pytest.mark.parametrize("pattern", [Full(), SWA(150), SWA(20)], ids=str)
def test_blocks_of_keys_that_all_rows_see_are_not_lost(pattern: Pattern) -> None:
    """Long enough for the loop without a mask, and for edges on either side of it."""
    case = make_case(q_heads=2, kv_heads=1, seq_len=300, head_dim=16, seed=1)
    assert_matches(case, pattern, TINY_BAND)


@pytest.mark.parametrize("permute_once", unless_thorough([True], [False, True]))
@pytest.mark.parametrize(
    "pattern", [SA(20, 5), SA(20, 5, circular=False), SA(9, 5, per_head=True), SA(35)], ids=str
)
def test_many_blocks_and_tiles_of_slots(pattern: SA, permute_once: bool) -> None:
    """Bands that wrap, blocks that hang over the end, and in the last pattern a short row for
    which the pattern is full attention beside long ones for which it is not."""
    config = BandConfig(TINY, tiles=3, permute_once=permute_once)
    case = make_case(
        batch=3, q_heads=3, kv_heads=1, seq_len=131, head_dim=16, lengths=[131, 90, 40], layer=2
    )
    assert_matches(case, pattern, config)


def test_rows_may_wait_for_their_first_visible_key() -> None:
    """With few of many keys in view, whole steps of a tile are hidden from most of its rows."""
    case = make_case(q_heads=1, kv_heads=1, seq_len=100, head_dim=16)
    assert_matches(case, SA(2), BandConfig(TINY, tiles=6))


@pytest.mark.parametrize("q_heads, kv_heads", [(5, 1), (12, 2)])
def test_heads_that_share_a_tile(q_heads: int, kv_heads: int) -> None:
    """More heads to a KV head than fit a tile of 16 rows, and a number that does not divide it."""
    case = make_case(q_heads=q_heads, kv_heads=kv_heads, seq_len=40, head_dim=16)
    for pattern in (SWA(9), SA(6)):
        assert_matches(case, pattern, TINY_BAND)


def test_rows_of_different_lengths_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_patch.kernels.triton import launch as triton_launch

    launches = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> object:
            launches.append(grid)
            return self.kernel[grid]

    for name in ("local_window_kernel", "ring_kernel"):
        monkeypatch.setattr(triton_launch, name, Counted(vars(triton_launch)[name]))
    case = make_case(batch=3, seq_len=40, lengths=[40, 17, 29])
    assert_matches(case, SA(4))
    assert_matches(case, SWA(4))
    assert len(launches) == 2


@pytest.mark.parametrize("scale", [1e-30, 30.0])
def test_any_scale(scale: float) -> None:
    """One that leaves all scores alike, and one that leaves a single key in the softmax."""
    case = make_case(seq_len=40, head_dim=16, scale=scale)
    for pattern in (SWA(9), SA(6)):
        expected = case.oracle(pattern).output
        out, _ = run(case, pattern, TINY_BAND)
        assert (out.double() - torch.from_numpy(expected)).abs().max() <= 2 * FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_sdpa(dtype: torch.dtype) -> None:
    for head_dim, patterns in (
        (64, [SA(12), SWA(9), MoBA(8, 3)]),
        (100, [Full(), SA(7, per_head=True)]),
    ):
        case = make_case(q_heads=6, kv_heads=3, seq_len=90, head_dim=head_dim, dtype=dtype)
        for pattern in patterns:
            expected = case.oracle(pattern)
            decided = torch.from_numpy(expected.margin > 1e-4)
            out, _ = run(case, pattern)
            assert out.dtype == dtype
            ours = (out.double() - torch.from_numpy(expected.output)).abs()[decided]
            theirs = sdpa_error(case, expected)[decided]
            assert ours.max() <= 2 * theirs.max(), pattern
            assert ours.square().mean() <= 4 * theirs.square().mean(), pattern


def sdpa_error(case: Case, expected: OracleResult) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        case.q, case.k, case.v, attn_mask=torch.from_numpy(expected.visible), enable_gqa=True
    )
    return (out.double() - torch.from_numpy(expected.output)).abs()


@pytest.mark.parametrize("pattern", [Full(), SWA(9), SA(6), MoBA(7, 3)], ids=str)
def test_strides_and_uninitialised_memory_do_not_show(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(batch=2, seq_len=50, head_dim=20, lengths=[50, 23])
    expected, _ = run(case, pattern)
    # Heads beside each other in memory, a last dimension of stride 2, and half of wider rows.
    views = [
        case.q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([case.k, case.k], -1)[..., 0],
        torch.cat([case.v, case.v], 3)[..., 20:],
    ]

    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def filled(*args: object, _real: object = real, **kwargs: object) -> Tensor:
            made: Tensor = _real(*args, **kwargs)  # type: ignore[operator]
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, filled)
    assert torch.isnan(torch.empty(2)).all()
    out, _ = run(case.with_tensors(*views), pattern)
    assert torch.equal(out, expected)
    assert torch.equal(out[1, :, 23:], torch.zeros_like(out[1, :, 23:]))


@pytest.mark.parametrize("pattern", [Full(), SWA(9), SA(6), MoBA(10, 2)], ids=str)
def test_nothing_beyond_the_last_row_is_read(pattern: Pattern) -> None:
    """There lies other memory: NaN here, which even a weight of zero would let through."""
    case = make_case(seq_len=23, head_dim=16)
    config = TINY_MOBA if isinstance(pattern, MoBA) else TINY_BAND
    expected, _ = run(case, pattern, config)
    q, k, v = (
        torch.nn.functional.pad(t, (0, 0, 0, 40), value=torch.nan)[:, :, :23]
        for t in (case.q, case.k, case.v)
    )
    out, _ = triton_backend.attend_with_lse(
        pattern, q, k, v, layer=0, spans=Spans((23,), (0,)), scale=16**-0.5, configs=(config,)
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("pattern", [Full(), SWA(9), SA(30), MoBA(7, 3)], ids=str)
def test_last_queries_alone_equal_the_end_of_the_whole(pattern: Pattern) -> None:
    case = make_case(batch=2, seq_len=50, head_dim=16, lengths=[50, 37])
    whole, whole_lse = run(case, pattern)
    starts = [length - 12 for length in case.real_tokens()]
    last = torch.stack([case.q[row, :, first : first + 12] for row, first in enumerate(starts)])
    part, lse = run(case.with_tensors(last, case.k, case.v), pattern, starts=starts)
    for row, first in enumerate(starts):
        there = slice(first, first + 12)
        assert (part[row] - whole[row, :, there]).abs().max() <= FP32_TOLERANCE
        assert (lse[row] - whole_lse[row, :, there]).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("pattern", [Full(), SWA(9), SA(6), MoBA(7, 3)], ids=str)
def test_outputs_before_a_changed_token_are_bit_identical(pattern: Pattern) -> None:
    case = make_case(seq_len=70, head_dim=16)
    config = TINY_MOBA if isinstance(pattern, MoBA) else TINY_BAND
    before, _ = run(case, pattern, config)
    changed = [t.clone() for t in (case.q, case.k, case.v)]
    for tensor in changed:
        tensor[:, :, 33:] = 20 * torch.randn(tensor[:, :, 33:].shape)
    after, _ = run(case.with_tensors(*changed), pattern, config)
    assert torch.equal(before[:, :, :33], after[:, :, :33])
    assert not torch.equal(before[:, :, 33:], after[:, :, 33:])


@pytest.mark.parametrize("pattern", [SWA(9), SA(6), MoBA(7, 3)], ids=str)
def test_a_row_does_not_depend_on_its_batch(pattern: Pattern) -> None:
    case = make_case(batch=3, seq_len=60, head_dim=16, lengths=[60, 31, 44])
    together, _ = run(case, pattern)
    for row, length in enumerate(case.real_tokens()):
        q, k, v = (t[row : row + 1, :, :length] for t in (case.q, case.k, case.v))
        alone = Case(q, k, v, None, case.layer)
        assert (run(alone, pattern)[0] - together[row, :, :length]).abs().max() <= FP32_TOLERANCE


def test_values_that_need_a_gradient_are_refused() -> None:
    case = make_case(seq_len=8)
    with pytest.raises(UserError, match="gradients"):
        run(case.with_tensors(case.q, case.k, case.v.requires_grad_()), SWA(3))
