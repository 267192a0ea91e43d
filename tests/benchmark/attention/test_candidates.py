"""FlashAttention beside the backends, as `flash` offers it, with torch standing in for it here.

Seen red when the two-sided band lacked a key on one side or counted the pairs of one side.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from sa_patch.benchmark.attention import flex_flash
from sa_patch.benchmark.attention.candidates import Candidate, NotServed, TwoSidedBand
from sa_patch.benchmark.record import TIMED, WRONG
from sa_patch.kernels import BACKENDS, Backend
from sa_patch.kernels.flash import backend as flash
from sa_patch.kernels.flash.libraries import Library
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern
from tests.benchmark.attention.builder import cells_of, run

PATTERNS: list[Pattern] = [
    *(Full(), SWA(7), SA(7, seed=3), SA(7, circular=False), SA(5, per_head=True)),
    *(MoBA(8, 3), MoBA(5, 1)),
]


def flash_stand_in(monkeypatch: pytest.MonkeyPatch, causal_band: bool = False) -> None:
    """FlashAttention's rivals as `flash` offers them, computed by torch."""

    def mask(q: Tensor, left: int, right: int) -> Tensor:
        behind = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return (behind <= left) & (-behind <= right)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )

    def full(q: Tensor, k: Tensor, v: Tensor, scale: float, library: Library) -> Tensor:
        return attend(q, k, v, mask(q, q.shape[2], 0), scale)

    def banded(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float) -> Tensor:
        return attend(q, k, v, mask(q, left, 0 if causal_band else right), scale)

    def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
        return isinstance(pattern, Full), "only full in this test"

    class Named(Library):
        def version(self) -> str:
            return self.title

    libraries = {
        "FlashAttention-9": Named("FlashAttention-9", "", (), None, ()),
        "FlashAttention-8": Named("FlashAttention-8", "", (), None, ()),
        "FlashAttention-7": "FlashAttention-7 is not installed",
    }
    stand_in = Backend("flash", "", supports, flash.BACKEND.attend)
    monkeypatch.setitem(BACKENDS, "flash", stand_in)
    monkeypatch.setattr(flash, "serving", lambda q, k, *, windowed: "FlashAttention-9")
    monkeypatch.setattr(flash, "able_libraries", lambda q, k: libraries)
    monkeypatch.setattr(flash, "full", full)
    monkeypatch.setattr(flash, "banded", banded)


@pytest.mark.parametrize("causal_band", [False, True])
def test_flash_attention_runs_beside_as_a_rival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, causal_band: bool
) -> None:
    flash_stand_in(monkeypatch, causal_band)
    outcome = run(tmp_path, methods="sa", backends="banded", window="8,9")
    (older,) = cells_of(outcome, "FlashAttention-8")[-1:]
    assert (older.label, older.status, older.rival) == ("full", TIMED, True)
    assert NotServed("rival: full", "FlashAttention-7", "FlashAttention-7 is not installed") in (
        outcome.bench.not_served
    )
    rivals = {c.label: c for c in cells_of(outcome, "FlashAttention-9") if c.n == 64}
    assert set(rivals) == {
        *("full", "swa:window=8", "swa:window=9"),
        *("two-sided band (7, 7)", "two-sided band (8, 8)"),
    }
    assert all(cell.rival for cell in rivals.values())
    band = rivals["two-sided band (7, 7)"]
    assert band.status == (WRONG if causal_band else TIMED) and band.window == 8
    assert math.isclose(band.flops, 4 * 8 * 4 * (64 * 15 - 8 * 7))
    assert rivals["swa:window=8"].status == TIMED


def test_flex_attention_by_flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks cover what is causal; where it takes no part it says why."""
    q = torch.zeros(1, 2, 300, 64)
    mask = flex_flash._causal_blocks(300, q.device, 64)
    assert mask.BLOCK_SIZE == (128, 128)
    assert mask.to_dense()[0, 0].equal(torch.ones(3, 3, dtype=torch.int32).tril())
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2]
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1]
    monkeypatch.setattr(Library, "load", lambda self: torch)
    assert "CUDA GPUs only, not on 'cpu'" in flex_flash.flex_flash_refusal(q)
    monkeypatch.setattr(Library, "load", lambda self: None)
    assert flex_flash.flex_flash_refusal(q).endswith("needs FlashAttention-4: not installed")
    monkeypatch.setattr(flex_attention, "_Backend", None)
    assert "has no FLASH form" in flex_flash.flex_flash_refusal(q)


@pytest.mark.parametrize("n", [1, 2, 17, 100])
@pytest.mark.parametrize("window", [1, 3, 40, 200])
def test_a_two_sided_band_counts_what_it_shows(n: int, window: int) -> None:
    band = TwoSidedBand(window)
    mask = band.visible(torch.arange(n), n)
    assert torch.equal(mask[0].sum(-1).double(), band.keys_per_query(n))
    assert torch.equal(mask[0], mask[0].T)
    assert not band.selection_dots(n).any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("n", [3, 20, 121])
def test_needed_work_is_the_measured_number_of_pairs(pattern: Pattern, n: int) -> None:
    one = Candidate("x", "x", pattern, lambda q, k, v, layer: q)
    for layer in (0, 5):
        pairs = float(pattern.count_visible(n, layer=layer, heads=2).double().mean(0).sum())
        dots = float(pattern.selection_dots(n).sum())
        assert one.needed_work(n) == pytest.approx(2 * pairs + dots, rel=1e-12)
