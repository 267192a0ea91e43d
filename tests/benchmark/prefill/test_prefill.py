"""The prefill benchmark: its models, its checks and its clocks.

Seen red when a hidden key, a wrong scale or a fallback passed the checks, a part was counted
twice, a short prompt's share of the time was too small for it, and one failure ended the run.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sa_patch.benchmark.clock import Call, Clock
from sa_patch.benchmark.prefill import correctness, measure
from sa_patch.benchmark.prefill.correctness import verify
from sa_patch.benchmark.prefill.models import PUBLISHED, make_model, published_config
from sa_patch.benchmark.prefill.options import PrefillOptions, make_options
from sa_patch.benchmark.prefill.parts import (
    CORE,
    MLP,
    PROJECTIONS,
    REST,
    Stopwatch,
    time_parts,
)
from sa_patch.benchmark.prefill.record import Prefill, Verdict, read_prefill
from sa_patch.benchmark.prefill.run import run_prefill
from sa_patch.benchmark.prefill.setups import Setup, applied, gather
from sa_patch.benchmark.record import FAILED, SKIPPED, TIMED
from sa_patch.benchmark.time_plan import SPENT, Seen, length_share
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS
from sa_patch.kernels.counting import counting_backends
from sa_patch.kernels.triton import tiles as triton_plans
from sa_patch.patching.tile_queries import tile_queries
from sa_patch.patterns import SA, SWA, BlockTopK, Full, MoBA, permutation
from tests.pictures import DRAWN, coloured
from tests.run_script import refusal

BANDED = [Setup(pattern, "banded") for pattern in (SA(16), SWA(16), MoBA(8, 2), Full())]


@pytest.fixture(scope="module", params=PUBLISHED)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param, device="cpu", dtype="float32", small=True)


@pytest.fixture
def dense_model() -> PreTrainedModel:
    return make_model("qwen3-8b", device="cpu", dtype="float32", small=True)


@pytest.mark.parametrize(
    "name, parameters", [("qwen3-8b", 8_190_735_360), ("qwen3-30b-a3b", 30_532_122_624)]
)
def test_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(published_config(name))
    assert sum(each.numel() for each in built.parameters()) == parameters


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_that_of_a_model_which_keeps_nothing_of_the_pass_before(
    dense_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    setup = Setup(BlockTopK(4, 2, 4, branch=0, shared=16, segment=16), "banded")
    asked: list[str] = []

    def memory(clock: Clock, call: Call) -> tuple[Tensor, int]:
        asked.append(device)
        assert not len(triton_plans.PLANS)
        assert not any(map(tile_queries, dense_model.modules()))
        return call(), 1

    monkeypatch.setattr(Clock, "memory", memory)
    deadline = time.monotonic() + 60
    measurer = measure.PrefillMeasurer(
        dense_model, "it", [setup], deadline, decoded=0, longest=None, say=lambda line: None
    )
    measurer._tokens = torch.randint(500, (1, 64))
    measurer.clock.device = torch.device(device)
    cell = measurer._cell(setup, 64)

    def leave_a_plan(*_: Any) -> None:
        triton_plans.PLANS.get("of a pass", lambda: (torch.zeros(1),))

    hook = dense_model.register_forward_hook(leave_a_plan)
    with torch.inference_mode():
        measurer.check(measurer.contestants[0], cell)
    hook.remove()
    assert (asked, cell.extra_bytes) == ([device], 1) and cell.parts[CORE] > 0


def wrong_ones(model: PreTrainedModel, setups: list[Setup]) -> set[str]:
    return {one.check for one in verify(model, "it", setups, 128) if not one.passed}


def test_right_backends_pass_every_check(model: PreTrainedModel) -> None:
    verdicts: list[Verdict] = list(verify(model, "it", BANDED, 128))
    assert all(one.passed for one in verdicts), verdicts
    assert [one.check for one in verdicts].count("causal") == len(BANDED)
    assert {one.check for one in verdicts} == {
        *("equals reference", "equals stock", "backend", "causal", "padding", "noise"),
    }


@pytest.mark.parametrize(
    "spoil, found",
    [
        (lambda attend, p, q, k, v, **rest: attend(SWA(15), q, k, v, **rest), "equals reference"),
        (
            lambda attend, p, q, k, v, **rest: attend(
                p, q, k, v, **rest | {"scale": 1.1 * rest["scale"]}
            ),
            "equals reference",
        ),
        (
            lambda attend, p, q, k, v, **rest: attend(p, q, k, v, **rest) + v.mean(2, True).mean(),
            "causal",
        ),
        (
            lambda attend, p, q, k, v, **rest: BACKENDS["reference"].attend(p, q, k, v, **rest),
            "backend",
        ),
    ],
    ids=["a key too few", "a wrong scale", "a look ahead", "another backend"],
)
def test_a_wrong_backend_is_found(
    dense_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, spoil: Any, found: str
) -> None:
    right = BACKENDS["banded"].attend

    def attend(*given: Any, **rest: Any) -> Tensor:
        result: Tensor = spoil(right, *given, **rest)
        return result

    wrong = dataclasses.replace(BACKENDS["flex"], attend=attend)
    monkeypatch.setitem(BACKENDS, "flex", wrong)
    assert found in wrong_ones(dense_model, [Setup(SWA(16), "flex")])


def test_full_attention_that_is_not_stocks_is_found(
    dense_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    banded = BACKENDS["banded"]

    def attend(pattern: Any, *given: Any, **rest: Any) -> Tensor:
        return banded.attend(SWA(64), *given, **rest)

    monkeypatch.setitem(BACKENDS, "banded", dataclasses.replace(banded, attend=attend))
    assert "equals stock" in wrong_ones(dense_model, [Setup(Full(), "banded")])


@pytest.mark.parametrize("setup", [Setup(), Setup(SA(16), "banded")], ids=["stock", "patched"])
def test_parts_are_each_times_of_their_own(
    model: PreTrainedModel, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    # A second passes whenever the watch is read.
    monkeypatch.setattr(Stopwatch, "_mark", lambda self: next(ticks))
    tokens = torch.randint(512, (1, 64))
    function, backends, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(BACKENDS), 0

    def forward() -> Tensor:
        nonlocal calls
        calls += 1
        logits: Tensor = model(tokens).logits
        return logits

    with torch.inference_mode(), applied(model, setup), counting_backends() as counted:
        before = forward()
        parts = time_parts(model, forward)
        assert torch.equal(forward(), before)
    # Two layers: in each one second in attention, two in the rest of its module, one in the MLP.
    assert parts == {CORE: 2, PROJECTIONS: 4, MLP: 2, REST: next(ticks) - 1 - 8}
    assert calls == 3
    assert sum(counted.values()) == (0 if setup.pattern is None else 3 * 2)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is function
    assert backends == BACKENDS


def options(out: Path, **given: Any) -> PrefillOptions:
    values: dict[str, Any] = {"device": "cpu", "small": True, "n": (48, 96), "decoded": 3}
    small = make_options(out=out, threads=1, **values | given)
    return dataclasses.replace(small, checked=64)


@pytest.fixture
def broken_moba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    banded = BACKENDS["banded"]

    def attend(pattern: Any, q: Tensor, *rest: Any, **named: Any) -> Tensor:
        if isinstance(pattern, MoBA) and q.shape[2] > 90:
            raise RuntimeError("no kernel for this")
        return banded.attend(pattern, q, *rest, **named)

    monkeypatch.setitem(BACKENDS, "banded", dataclasses.replace(banded, attend=attend))
    yield


def test_a_run_is_on_disk_and_one_failure_costs_only_itself(
    tmp_path: Path, broken_moba: None
) -> None:
    lines: list[str] = []
    bench = run_prefill(options(tmp_path, models=["qwen3-30b-a3b"]), lines.append)
    read = json.loads((tmp_path / "prefill.json").read_text())
    assert read["complete"] and len(read["prefills"]) == 2 * 6
    assert [(c.n, c.label) for c in bench.cells if c.status == FAILED] == [
        (96, "moba:block_size=16,topk=2")
    ]
    assert bench.wrong() == [
        "failed: qwen3-30b-a3b: moba:block_size=16,topk=2, banded, n = 96: "
        "RuntimeError: no kernel for this"
    ]
    timed = [c for c in bench.cells if c.status == TIMED]
    assert len(timed) == 11
    assert all(len(c.seconds) >= 2 and c.extra_bytes and c.parts for c in timed)
    assert all(c.calls == {"banded": 2} for c in timed if c.backend)
    # Written after the prompt, by the stock model and one sparse setup.
    assert {(c.n, c.label) for c in timed if len(c.decode_seconds) == 3} == {
        (n, label) for n in (48, 96) for label in ("stock", "sa:window=32,seed=0")
    }
    assert all((c.draw_seconds is not None) == c.label.startswith("sa:") for c in timed)
    text = (tmp_path / "prefill.md").read_text()
    assert "no kernel for this" in text and "rehearsal" in text
    assert coloured(tmp_path / "prefill.png") > DRAWN


def refusing(monkeypatch: pytest.MonkeyPatch, broken: type, checked: list[str]) -> None:
    banded = BACKENDS["banded"]

    def attend(pattern: Any, *given: Any, **rest: Any) -> Tensor:
        checked.append(str(pattern))
        if isinstance(pattern, broken):
            raise RuntimeError("out of resource: shared memory")
        return banded.attend(pattern, *given, **rest)

    monkeypatch.setitem(BACKENDS, "banded", dataclasses.replace(banded, attend=attend))


def test_a_setup_that_raises_in_its_checks_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, SWA, [])
    run = options(tmp_path, models=["qwen3-8b"], n=(48,), patterns=("swa:16", "sa:16"))
    bench = run_prefill(run, lambda line: None)
    assert bench.wrong() == [
        "wrong: qwen3-8b: runs, swa:window=16 | banded: off by inf, allowed 0 "
        "RuntimeError: out of resource: shared memory"
    ]
    assert [(c.label, c.status) for c in bench.cells] == [
        ("stock", TIMED),
        ("sa:window=16,seed=0", TIMED),
    ]
    assert read_prefill(tmp_path / "prefill.json").wrong() == bench.wrong()
    assert "out of resource" in (tmp_path / "prefill.md").read_text()


def test_a_setup_that_loses_the_device_is_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    refusing(monkeypatch, SWA, checked)
    monkeypatch.setattr(correctness, "device_lives", lambda device: False)
    patterns = ("moba:16,2", "swa:16", "sa:16")
    run = options(tmp_path, models=["qwen3-8b"], n=(48,), patterns=patterns)
    with pytest.raises(RuntimeError, match="out of resource"):
        run_prefill(run, lambda line: None)
    assert not any(label.startswith("sa:") for label in checked)
    checked.clear()
    resumed = read_prefill(tmp_path / "prefill.json")
    before = list(resumed.verdicts)
    bench = run_prefill(run, lambda line: None, resumed=resumed)
    assert bench.verdicts[: len(before)] == before and bench.checked("qwen3-8b")
    assert not any(label.startswith("swa:") for label in checked)
    assert {c.label for c in bench.where(status=TIMED)} == {
        *("stock", "moba:block_size=16,topk=2", "sa:window=16,seed=0")
    }


def test_what_does_not_fit_into_the_time_is_skipped_and_said(tmp_path: Path) -> None:
    bench = run_prefill(options(tmp_path, models=["qwen3-8b"], budget=1e-3), lambda line: None)
    assert {c.reason for c in bench.cells} == {SPENT}
    assert "the time budget was spent before" in (tmp_path / "prefill.md").read_text()


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupted(line: str) -> None:
        if line == "qwen3-8b, n = 48":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prefill(options(tmp_path, models=["qwen3-8b"]), interrupted)
    read = json.loads((tmp_path / "prefill.json").read_text())
    assert not read["complete"] and {c["n"] for c in read["prefills"]} == {48}
    assert "Not finished" in (tmp_path / "prefill.md").read_text()


def test_a_prompt_leaves_the_text_no_more_room_than_the_model_has(
    checkpoint: Path, tmp_path: Path
) -> None:
    given = {"models": [str(checkpoint)], "small": False, "patterns": ["swa:4"], "dtype": None}
    limit = AutoConfig.from_pretrained(checkpoint).max_position_embeddings
    run = options(tmp_path, **given, n=(limit - 2, limit), budget=60)
    bench = run_prefill(run, lambda line: None)
    stock = [c for c in bench.cells if c.label == "stock"]
    assert [(c.n, c.status, len(c.decode_seconds)) for c in stock] == [
        (limit - 2, TIMED, 2),
        (limit, TIMED, 0),
    ]
    with pytest.raises(UserError, match=f"{limit + 1} tokens is longer than the {limit} that"):
        run_prefill(options(tmp_path, **given, n=(limit + 1,)), lambda line: None)


def test_interpreted_kernels_have_no_times(dense_model: PreTrainedModel) -> None:
    pytest.importorskip("triton")
    _, refused = gather(dense_model, [SA(16)], ["triton"])
    assert refused == {
        "sa:window=16,seed=0 | triton": "interpreted kernels run for correctness, never for time"
    }


@pytest.mark.parametrize(
    "given, words",
    [
        ({"models": ["no/such/folder/here"]}, "no model at"),
        ({"models": ["smollm2-135m"], "small": True}, "shrinks"),
        ({"patterns": ["sa:0"]}, "window"),
        ({"backends": ["tritn"]}, "did you mean 'triton'"),
        ({"n": [0]}, "n must be a whole number of at least 1"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"budget": 0}, "budget must be a positive number"),
    ],
)
def test_mistakes_are_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make_options(**{"device": "cpu", **given})
    assert "\n" not in str(caught.value)


def test_the_script_refuses_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["--device", "cuda", "--out", str(tmp_path)]
    assert refusal("bench_prefill", given, monkeypatch, capfd) == (
        "bench_prefill: error: torch sees no CUDA device here; use --device cpu"
    )


def test_short_prompts_are_timed_however_small_their_share(tmp_path: Path) -> None:
    run = options(tmp_path, models=["qwen3-8b"], n=(4, 256), budget=60)
    bench = run_prefill(run, lambda line: None)
    assert {c.status for c in bench.cells} == {TIMED}
    assert length_share(4, (4, 256)) * 60 < 0.2


def measurer_of(
    model: PreTrainedModel, setups: list[Setup], deadline: float
) -> measure.PrefillMeasurer:
    return measure.PrefillMeasurer(
        model, "it", setups, deadline, decoded=0, longest=None, say=lambda line: None
    )


def test_rounds_that_are_owed_keep_their_time(
    dense_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two setups would fit into 18 seconds with three passes of 4, and not both."""
    monkeypatch.setattr(measure, "time_parts", lambda model, forward: {CORE: 4.0})
    setups = [Setup(), Setup(SWA(16), "banded")]
    deadline = time.monotonic() + 18
    measurer = measurer_of(dense_model, setups, deadline)
    for one in measurer.contestants:
        measurer.history.keep(one, Seen(64, 4000.0, 0))
    cells: list[Prefill] = []
    measurer.measure(64, 0.5, cells)
    assert [cell.status for cell in cells] == [TIMED, SKIPPED]
    assert "a call would take about 4.0 s" in cells[1].reason


def test_permutations_and_plans_are_made_anew_in_every_pass(
    dense_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    fresh = permutation._draw_fresh

    def counted(seq_len: int, *rest: Any) -> Any:
        drawn.append(seq_len)
        return fresh(seq_len, *rest)

    monkeypatch.setattr(permutation, "_draw_cached", lru_cache(counted))
    setup, passes = Setup(SA(16), "banded"), 0

    def forward(*_: Any) -> None:
        nonlocal passes
        passes += 1

    with dense_model.register_forward_pre_hook(forward):
        deadline = time.monotonic() + 20
        measurer = measurer_of(dense_model, [setup], deadline)
        measurer.measure(64, 0.01, [])
    # Every pass draws for both layers; drawing alone, of many layers at once, goes another way.
    assert passes >= 5
    assert len(drawn) == 2 * passes
