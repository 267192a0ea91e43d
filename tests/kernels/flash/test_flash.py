"""Backend `flash` on stand-ins of the libraries: no GPU is needed, and none was used.

The stand-ins have the real parameters and compute on the CPU, so that windows, alignment, layout,
packing and argument names are tested; the kernels themselves are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa_patch.errors import UserError
from sa_patch.kernels import reference
from sa_patch.kernels.backend import Spans
from sa_patch.kernels.flash import backend as flash
from sa_patch.kernels.flash import libraries as flash_libraries
from sa_patch.kernels.flash.libraries import LIBRARIES, Library, Need
from sa_patch.patterns import SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, Tail
from tests.kernels.flash import stand_ins
from tests.laws.strategies import Case, make_case

TOLERANCE = 0.02  # absolute, of one rounding to bfloat16 of values up to about 4

FA4, FA3, FA3_FORWARD, FA2 = LIBRARIES
STAND_INS: dict[str, Callable[[], ModuleType]] = {
    FA4.module: stand_ins.flash_attn_4,
    FA3.module: lambda: stand_ins.flash_attn_3(FA3.module, with_lse=True),
    FA3_FORWARD.module: lambda: stand_ins.flash_attn_3(FA3_FORWARD.module),
    FA2.module: stand_ins.flash_attn_2,
}
# What fa3_fwd 0.0.3 from PyPI is built without, as its fa3_fwd_config says.
FORWARD_LACKS = ("LOCAL", "FP16", "BACKWARD")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine has: each test installs what it needs."""
    for library in LIBRARIES:
        for name in (library.module, library.build_module):
            if name:
                monkeypatch.setitem(sys.modules, name, None)
    flash_libraries._import.cache_clear()
    yield
    flash_libraries._import.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *libraries: Library) -> None:
    for library in libraries:
        monkeypatch.setitem(sys.modules, library.module, STAND_INS[library.module]())
    flash_libraries._import.cache_clear()


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.module)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    install(monkeypatch, request.param)
    # Past the check for a GPU, which stand-ins do not need.
    monkeypatch.setattr(flash, "_library", lambda q, k, v, windowed: request.param)
    return request.param


def bfloat16_case(**shape: object) -> Case:
    return make_case(dtype=torch.bfloat16, poison=False, **shape)  # type: ignore[arg-type]


def worst(case: Case, pattern: Pattern, spans: Spans, queries: slice = slice(None)) -> float:
    """Largest difference from `reference` in fp32 at real queries."""
    q = case.q[:, :, queries]
    scale = 0.3
    ours = flash.attend(pattern, q, case.k, case.v, layer=0, spans=spans, scale=scale)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    wide = [x.float() for x in (q, case.k, case.v)]
    expected = reference.attend(pattern, *wide, layer=0, spans=spans, scale=scale)
    padded = spans.padded_queries(q.shape[2], q.device)
    difference = (ours.float() - expected).abs()
    if padded is not None:
        difference = difference.masked_fill(padded[:, None, :, None], 0)
    return float(difference.max())


@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("window", [1, 2, 7, 39, 40, 41])
def test_windows_of_whole_rows(library: Library, window: int, head_dim: int) -> None:
    case = bfloat16_case(batch=2, seq_len=40, head_dim=head_dim)
    assert worst(case, SWA(window), Spans((40, 40), (0, 0))) <= TOLERANCE


@pytest.mark.parametrize("pattern", [Full(), SWA(9), SWA(300)], ids=str)
def test_packed_rows_in_one_call(
    library: Library, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several sequences in a row, each as if alone."""
    case = bfloat16_case(batch=2, seq_len=40, q_heads=4, kv_heads=2)
    calls: list[list[int]] = []
    packed = Library.packed

    def counted(*args: Any, **given: Any) -> torch.Tensor:
        calls.append(args[4])
        return packed(*args, **given)

    monkeypatch.setattr(Library, "packed", counted)
    spans = Spans.packed([[22, 1, 17], [40]])
    given: dict[str, Any] = {"layer": 0, "scale": 0.3}
    out = flash.attend(pattern, case.q, case.k, case.v, spans=spans, **given)
    assert flash.BACKEND.packs(pattern) and calls == [[22, 1, 17, 40]]
    parts = [
        reference.attend(pattern, *one, spans=Spans((one[0].shape[2],), (0,)), **given)
        for one in spans.sequences(*(x.float() for x in (case.q, case.k, case.v)))
    ]
    expected = torch.stack([torch.cat(parts[:3], dim=2)[0], parts[3][0]])
    assert (out.float() - expected).abs().max() <= TOLERANCE


def test_full_attention_and_saturated_patterns(library: Library) -> None:
    case = bfloat16_case(seq_len=30, q_heads=6, kv_heads=2)
    for pattern in (Full(), SWA(30), SA(16), MoBA(10, 3)):
        assert worst(case, pattern, Spans((30,), (0,))) <= TOLERANCE


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_rows_of_any_length_and_last_queries(library: Library, data: st.DataObject) -> None:
    """Padding at the right, empty rows, and fewer queries than keys."""
    seq_len = data.draw(st.integers(1, 24))
    lengths = data.draw(st.lists(st.integers(0, seq_len), min_size=1, max_size=4))
    queries = data.draw(st.integers(1, seq_len))
    starts = [0] * len(lengths)
    if queries < seq_len:
        # The last ones, or, in a cache of fixed size, some of them padding.
        starts = [max(0, n - data.draw(st.integers(1, queries))) for n in lengths]
    pattern = SWA(data.draw(st.integers(1, 30)))
    case = bfloat16_case(batch=len(lengths), seq_len=seq_len, seed=data.draw(st.integers(0, 99)))
    spans = Spans(tuple(lengths), tuple(starts))
    assert worst(case, pattern, spans, slice(queries)) <= TOLERANCE


def test_only_real_tokens_are_computed(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    band = stand_ins.band

    def counted(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((len(q), len(k)))
        return band(q, k, *rest)

    monkeypatch.setattr(stand_ins, "band", counted)
    case = bfloat16_case(batch=3, seq_len=50)
    worst(case, SWA(9), Spans((50, 3, 0), (0, 0, 0)))
    assert seen == [(50, 50), (3, 3)]


def test_two_sided_band_and_full_of_the_benchmark(library: Library) -> None:
    case = bfloat16_case(batch=2, seq_len=33)
    behind = torch.arange(33)[:, None] - torch.arange(33)
    q, k, v = case.q.float(), case.k.float(), case.v.float()
    for left, right in ((4, 4), (7, 0), (0, 3)):
        mask = (behind <= left) & (behind >= -right)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        ours = flash.banded(case.q, case.k, case.v, left, right, 0.3)
        assert (ours.float() - expected).abs().max() <= TOLERANCE
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    ours = flash.full(case.q, case.k, case.v, 0.3)
    assert (ours.float() - expected).abs().max() <= TOLERANCE


def test_gradients_reach_real_tokens_only(library: Library) -> None:
    case = bfloat16_case(batch=2, seq_len=12)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    spans = Spans((12, 5), (0, 0))
    flash.attend(SWA(4), *inputs, layer=0, spans=spans, scale=0.3).float().square().sum().backward()
    wide = [x.float().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    expected = reference.attend(SWA(4), *wide, layer=0, spans=spans, scale=0.3)
    (expected[0].square().sum() + expected[1, :, :5].square().sum()).backward()
    for ours, theirs in zip(inputs, wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert not ours.grad[1, :, 5:].any()
        assert (ours.grad.float() - theirs.grad).abs().max() <= 0.1 * theirs.grad.abs().max()


def need(**change: object) -> Need:
    usual = Need(
        windowed=True, dtype=torch.bfloat16, head_dim=128, capability=(9, 0), gradients=False
    )
    return Need(**{**usual.__dict__, **change})


def test_the_newest_able_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *LIBRARIES)
    assert flash._able(need()) is FA4
    assert flash._able(need(capability=(10, 0))) is FA4
    assert flash._able(need(capability=(10, 0), head_dim=192)) is FA2
    assert flash._able(need(capability=(8, 6))) is FA3
    assert flash._able(need(capability=(12, 0))) is FA2
    refusal = flash._able(need(capability=(7, 5)))
    assert isinstance(refusal, str) and refusal.count("does not run on compute capability 7.5") == 4
    assert "at most 256 here, got 264" in str(flash._able(need(head_dim=264)))
    assert "not float32" in str(flash._able(need(dtype=torch.float32)))


def test_each_generation_serves_full_attention_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FA4, FA3_FORWARD)
    found = flash._by_generation(need(windowed=False))
    assert list(found.values()) == [FA4, FA3_FORWARD, "FlashAttention-2 is not installed"]
    install(monkeypatch, FA3)
    assert flash._by_generation(need(windowed=False))[FA3.title] is FA3
    found = flash._by_generation(need(windowed=False, capability=(10, 0)))
    assert found[FA3.title] == "FlashAttention-3 does not run on compute capability 10.0"
    assert "not float32" in str(flash._by_generation(need(dtype=torch.float32))[FA4.title])
    q = torch.zeros(1, 2, 64, 64)
    assert all("not on 'cpu'" in str(why) for why in flash.able_libraries(q, q).values())


def test_what_a_build_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """fa3_fwd 0.0.3 has neither windows nor float16 nor gradients."""
    flags = stand_ins.build_flags("fa3_fwd_config", FORWARD_LACKS)
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", flags)
    install(monkeypatch, FA3_FORWARD)
    assert flash._able(need(windowed=False)) is FA3_FORWARD
    assert "lacks sliding windows" in str(flash._able(need()))
    assert "lacks float16" in str(flash._able(need(windowed=False, dtype=torch.float16)))
    assert "lacks gradients" in str(flash._able(need(windowed=False, gradients=True)))
    install(monkeypatch, FA2)
    assert flash._able(need()) is FA2
    assert flash._able(need(windowed=False)) is FA3_FORWARD


def test_head_dims_left_out_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = stand_ins.build_flags("flash_attn_config", ("HDIM256", "VARLEN"))
    monkeypatch.setitem(sys.modules, "flash_attn_config", flags)
    install(monkeypatch, FA3)
    assert "lacks rows of different lengths" in str(flash._able(need()))
    flags.CONFIG["build_flags"]["FLASHATTENTION_DISABLE_VARLEN"] = False
    assert flash._able(need(head_dim=128)) is FA3
    assert "lacks head_dim 200" in str(flash._able(need(head_dim=200)))


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash.version() is None and flash.installed_versions() == []
    install(monkeypatch, FA2, FA3_FORWARD)
    monkeypatch.setattr(sys.modules[FA2.module], "__version__", "2.8.3", raising=False)
    found = flash.installed_versions()
    assert [name.partition(" (")[0] for name in found] == ["FlashAttention-3", "FlashAttention-2"]
    assert flash.version() == found[0]


def test_a_library_that_fails_to_load_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Built for another torch, say: the import raises OSError, not ImportError."""
    broken = f"{tmp_path}/flash_attn_interface.py"
    with open(broken, "w") as file:
        file.write("raise OSError('undefined symbol')\n")
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.syspath_prepend(str(tmp_path))
    flash_libraries._import.cache_clear()
    assert FA3.version() is None
    assert "no FlashAttention library is installed" in str(flash._able(need()))


def test_refusals_on_this_machine() -> None:
    q = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)
    able, reason = flash.supports(SWA(8), q, q)
    assert not able and "CUDA GPUs only, not on 'cpu'" in reason
    with pytest.raises(UserError, match="CUDA GPUs only"):
        flash.full(q, q, q, 1.0)
    with pytest.raises(UserError, match="CUDA GPUs only"):
        flash.banded(q, q, q, 3, 3, 1.0)
    with pytest.raises(UserError, match="CUDA GPUs only"):
        flash.attend(SWA(8), q, q, q, layer=0, spans=Spans((64,), (0,)), scale=1.0)


def test_block_plans_are_refused_where_flash_attention_4_cannot_walk_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pattern in (SA(8), MoBA(8, 2), Sinks(2) | SWA(4)):
        assert flash.plan_refusal(pattern, need()) == "FlashAttention-4 is not installed"
    install(monkeypatch, FA3)
    assert flash.plan_refusal(SA(8), need()) == "FlashAttention-4 is not installed"
    install(monkeypatch, FA4)
    assert flash.plan_refusal(SA(8), need()) == ""
    for changed, reason in (
        ({"capability": (8, 0)}, "on compute capability 9.x and 10.x, not on 8.0"),
        ({"dtype": torch.float32}, "float16 and bfloat16, not float32"),
        ({"gradients": True}, "no gradients here over lists"),
        ({"head_dim": 264}, "head_dim of at most 256"),
        ({"head_dim": 192, "capability": (10, 0)}, "head_dim of at most 128"),
    ):
        assert reason in flash.plan_refusal(SA(8), need(**changed))
    assert "no rule for the pattern 'tail'" in flash.plan_refusal(Tail(3), need())
    weighed = BlockTopK(16, 4, branch=0, shared=32, threshold=0.2)
    assert flash.plan_refusal(weighed, need(head_dim=64)) == ""
    assert "a threshold weighs" in flash.plan_refusal(weighed, need(head_dim=20))
