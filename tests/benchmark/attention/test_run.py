"""The benchmark from end to end on tiny shapes: checks, record, files, interrupts, rivals.

Nothing here asserts a time. Seen red when a cell that failed its check was timed all the same or
left the exit status 0, `layer` was the same in two calls, and only the first row was checked.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.benchmark.attention.record import read_bench
from sa_patch.benchmark.clock import Clock
from sa_patch.benchmark.record import FAILED, OUT_OF_MEMORY, TIMED, WRONG, write_results
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS, Backend, Spans, reference
from sa_patch.patterns import SWA, Pattern
from tests.benchmark.attention.builder import cells_of, register, run


def test_a_run_times_every_method_on_every_backend_beside_sdpa(tmp_path: Path) -> None:
    said: list[str] = []
    outcome = run(tmp_path, said, all_files=True)
    bench = outcome.bench
    assert outcome.exit_status == 0 and bench.complete
    assert [path.name for path in outcome.files] == [
        *("attention.json", "attention.md", "attention.png")
    ]
    expected = {("SDPA full", "torch")} | {
        (method, backend)
        for method in ("sa:window=8,seed=0", "swa:window=8", "moba:block_size=4,topk=2", "full")
        for backend in ("reference", "banded")
    }
    for n in (32, 64):
        assert {(cell.label, cell.backend) for cell in bench.where(n=n)} == expected
    for cell in bench.cells:
        assert cell.status == TIMED and len(cell.samples_ms) == 4
        assert cell.correctness is not None and cell.correctness.error <= 1e-5
        assert cell.extra_bytes is not None and cell.extra_bytes > 0
        # q and the result have 4 heads, k and v 2: 12 rows of 8 floats for each token.
        assert cell.io_bytes == 12 * cell.n * 8 * 4
        assert any(cell.label in line for line in said)
    assert "1.00x SDPA full" in "\n".join(said)
    picked = [cell.backend for cell in bench.where(n=32) if cell.automatic]
    assert picked == ["reference"] * 4


def test_the_profiler_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, n=(16,), methods="swa", backends="banded")
    assert capfd.readouterr().err == ""


def test_memory_of_a_dense_mask_is_seen(tmp_path: Path) -> None:
    outcome = run(tmp_path, n=(512,), methods="swa", repeats=1)
    dense = cells_of(outcome, "reference")[0].extra_bytes
    assert dense is not None and dense >= 512 * 512, "the mask alone has a byte for each pair"
    result, extra = Clock("cpu").memory(lambda: torch.ones(1000) + torch.ones(1000))
    assert result.sum() == 2000 and 2 * 4000 <= extra <= 3 * 4000


def wrong_window(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    other = SWA(pattern.window + 1) if isinstance(pattern, SWA) else pattern
    return reference.attend(other, q, k, v, **rest)


def test_a_wrong_backend_gets_no_time_and_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, wrong_window)
    said: list[str] = []
    outcome = run(tmp_path, said, all_files=True, methods="swa,full", backends="mine,banded")
    assert outcome.exit_status == 1
    bad = [cell for cell in cells_of(outcome, "mine") if cell.label == "swa:window=8"]
    assert [cell.status for cell in bad] == [WRONG, WRONG]
    for cell in bad:
        assert cell.samples_ms == [] and cell.median_ms is None and cell.quartiles_ms is None
        assert cell.correctness is not None and cell.correctness.error > 1e-3
        assert "off by" in cell.reason and outcome.bench.rates(cell) is None
    assert all(c.status == TIMED for c in outcome.bench.cells if c not in bad)
    assert "WRONG" in "\n".join(said) and "wrong: off by" in "\n".join(said)
    text = (tmp_path / "attention.md").read_text()
    assert "**Wrong results, not timed:** swa:window=8 on mine at n = 32" in text


@pytest.mark.parametrize(
    "error, status, exit_status",
    [
        (RuntimeError("no kernel for\nthis"), FAILED, 1),
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY, 0),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OUT_OF_MEMORY, 0),
    ],
)
def test_a_call_that_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: str,
    exit_status: int,
) -> None:
    def attend(*args: Any, **rest: Any) -> Tensor:
        raise error

    register(monkeypatch, attend)
    outcome = run(tmp_path, methods="full", backends=("mine", "banded"))
    assert [cell.status for cell in cells_of(outcome, "mine")] == [status, status]
    assert "\n" not in cells_of(outcome, "mine")[0].reason
    assert all(cell.status == TIMED for cell in cells_of(outcome, "banded"))
    assert outcome.exit_status == exit_status


def test_every_timed_call_has_a_layer_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []

    def attend(
        pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, layer: int, **rest: Any
    ) -> Tensor:
        layers.append(layer)
        return reference.attend(pattern, q, k, v, layer=layer, **rest)

    register(monkeypatch, attend)
    run(tmp_path, methods="sa", backends="mine", repeats=6)
    drawn = [layer for layer in layers if layer != 0]
    assert len(drawn) == len(set(drawn)) >= 2 * 6, "layer 0 is the check's, at each length"
    assert layers.count(0) == 2


def test_the_record_survives_writing_and_reading(tmp_path: Path) -> None:
    outcome = run(tmp_path, batch=2, methods="sa,moba")
    path = tmp_path / "attention.json"
    back = read_bench(path)
    assert back.cells == outcome.bench.cells and back.ceilings == outcome.bench.ceilings
    write_results(tmp_path / "again", back.content())
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    content = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert content["schema"] == 1 and content["options"]["batch"] == 2
    assert {"versions", "git", "hardware", "command", "load_average"} <= set(content["provenance"])
    first = content["cells"][0]
    assert len(first["samples_ms"]) == 4 and first["rates"]["gap"] > 0


def test_a_record_of_another_schema_or_without_a_part_is_refused(tmp_path: Path) -> None:
    run(tmp_path, n=(16,), methods="full", backends="banded")
    path = tmp_path / "attention.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema": 99}))
    with pytest.raises(UserError, match="has schema 99; this version reads 1"):
        read_bench(path)
    del content["cells"][0]["io_bytes"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="lacks a part of a benchmark: 'io_bytes'"):
        read_bench(path)


def test_a_folder_in_the_way_is_refused_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Clock, "milliseconds", lambda *args: pytest.fail("something was timed"))
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path / "file")


def test_a_refusal_is_listed_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shy = Backend("shy", "", lambda pattern, q, k: (False, "not today"), reference.attend)
    monkeypatch.setitem(BACKENDS, "shy", shy)
    outcome = run(tmp_path, all_files=True, methods="swa", backends=("shy", "banded"))
    mine = [one for one in outcome.bench.not_served if one.backend == "shy"]
    assert [(one.label, one.reason) for one in mine] == [("swa:window=8", "not today")]
    assert "| swa:window=8 | shy | not today |" in (tmp_path / "attention.md").read_text()
    assert cells_of(outcome, "shy") == []


def test_rows_of_a_batch_are_all_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, spans: Spans, **rest: Any
    ) -> Tensor:
        out = reference.attend(pattern, q, k, v, spans=spans, **rest)
        out[-1, 0, -1] += 1
        return out

    register(monkeypatch, attend)
    outcome = run(tmp_path, methods="full", backends="mine", batch=3)
    assert [cell.status for cell in cells_of(outcome, "mine")] == [WRONG, WRONG]
