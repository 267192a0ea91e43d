"""What plans visit, known without a card: closed forms, and bounds that keep it from growing."""

from __future__ import annotations

import pytest

from sa_patch.benchmark.plan_fit import H100_FLOPS, Model, chosen_patterns, plan_fit, plan_table
from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.patterns import SA, Full, parse_pattern

MODEL = Model(heads=4, kv_heads=1)
N = 4096

# Visible pairs over visited ones, at least; what was found when the plan was made, rounded down.
FIT = {
    "full": 0.96,
    "swa:256": 0.66,
    "sinks:4+swa:256": 0.51,
    "sa:256": 0.39,
    "sa:256,per_head=true": 0.39,
    "psa:256": 0.20,
    "block_topk:8,8,8,branch=0,shared=32,segment=128": 0.62,
    "sinks:4+swa:128+psa:128": 0.16,
}


@pytest.mark.parametrize("text", FIT)
def test_plans_visit_no_more_than_they_did(text: str) -> None:
    assert plan_fit(parse_pattern(text), N, MODEL).fit >= FIT[text]


def test_stochastic_attention_visits_five_blocks_of_keys() -> None:
    """128 slots and 255 to either side lie in 5 blocks of 128."""
    found = plan_fit(SA(256), N, MODEL)
    assert found.visited == N * 640 and found.whole == 0
    assert found.flops == 4 * N * 640 * MODEL.heads * MODEL.head_dim
    # Rows of q and of the result, of k and v, are read and written in the kernel and put in order.
    moved = 3 * 2 * (MODEL.heads + MODEL.kv_heads) * 2 * MODEL.head_dim * N
    assert moved < found.bytes < 1.02 * moved
    assert found.floor_ms == pytest.approx(1e3 * found.bytes / 3.35e12)


def test_full_attention_masks_the_diagonal_alone() -> None:
    found = plan_fit(Full(), N, MODEL)
    blocks = N // 128
    assert found.visited == 128 * 128 * blocks * (blocks + 1) / 2
    assert found.whole == pytest.approx((blocks - 1) / (blocks + 1))
    wide = plan_fit(Full(), N, Model(heads=32, kv_heads=8))
    assert wide.floor_ms == pytest.approx(1e3 * wide.flops / H100_FLOPS)


def test_the_command_prints_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--plan", "--n", "1K,2K", "--methods", "sa,swa:64", "--heads", "4"]
    assert main([*asked, "--kv-heads", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 + 4 and "sa:window=256,seed=0" in shown[2]
    assert plan_table([plan_fit(SA(256), 2048, Model(4, 2))]).splitlines()[2] == shown[4]


def test_patterns_without_a_plan_are_refused() -> None:
    (tail,) = chosen_patterns(["tail:4"], 256)
    with pytest.raises(UserError, match="tail has no block plan"):
        plan_fit(tail, 64, MODEL)
