"""What fits into a benchmark's time, and bad options.

Seen red when the baseline was refused before a quicker cell, two repetitions were enough, and
memory of a dense mask was taken to grow as n.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.benchmark.attention.candidates import Candidate
from sa_patch.benchmark.attention.options import AttentionOptions, make_options
from sa_patch.benchmark.time_plan import (
    History,
    Seen,
    length_share,
    refuse,
    repetitions,
    rounds_of,
)
from sa_patch.errors import UserError
from sa_patch.files.artifacts import check_folder
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern


def contestant(name: str, pattern: Pattern, dense: bool = False) -> Candidate:
    return Candidate(name, "b", pattern, lambda q, k, v, layer: q, dense=dense)


def test_time_grows_with_the_needed_work_and_a_dense_mask_as_the_square() -> None:
    history = History()
    full, swa = contestant("full", Full()), contestant("swa", SWA(16))
    mask = contestant("mask", SWA(16), dense=True)
    for one in (full, swa, mask):
        assert history.milliseconds(one, 100) is None and history.extra_bytes(one, 100) is None
        history.keep(one, Seen(1000, 10.0, 500))
    assert history.milliseconds(full, 2000) == pytest.approx(40, rel=0.01)
    assert history.milliseconds(swa, 2000) == pytest.approx(20, rel=0.02)
    assert history.milliseconds(mask, 2000) == 40
    assert history.extra_bytes(swa, 4000) == 2000 and history.extra_bytes(mask, 4000) == 8000
    history.keep(swa, Seen(500, 99.0, 1))
    assert history.seen[swa.key].n == 1000, "a shorter call must not replace a longer one"


def test_the_baseline_comes_first_and_the_quick_before_the_slow() -> None:
    history = History()
    base = contestant("base", Full())
    cells = {name: contestant(name, SWA(4)) for name in ("slow", "quick", "new")}
    for one, ms in ((base, 1000.0), (cells["slow"], 900.0), (cells["quick"], 10.0)):
        history.keep(one, Seen(64, ms, 0))
    everyone = [base, *cells.values()]

    def refused(seconds: float) -> set[str]:
        reasons = refuse(everyone, history, 64, seconds=seconds, free_bytes=None)
        return {key.partition(" |")[0] for key in reasons}

    assert refused(100) == set()
    # The baseline costs its check and 3 repetitions, the slow cell a call more as it is quicker.
    assert refused(4 * 1.0 + 5 * 0.01 + 5 * 0.9 + 0.01) == set()
    assert refused(4 * 1.0 + 5 * 0.01 + 5 * 0.9 - 0.01) == {"slow"}
    assert refused(4 * 1.0 + 5 * 0.01 + 0.01) == {"slow"}
    assert refused(4 * 1.0 - 0.01) == {"base", "slow"}
    assert refused(0) == {"base", "slow", "quick", "new"}


def test_what_would_not_fit_into_memory_is_refused_with_the_figures() -> None:
    history, one = History(), contestant("mask", SWA(4), dense=True)
    history.keep(one, Seen(1024, 1.0, 1 << 30))
    free = 8 << 30
    assert refuse([one], history, 2048, seconds=99, free_bytes=free) == {}
    reasons = refuse([one], history, 4096, seconds=99, free_bytes=free)
    assert reasons == {one.key: "would take about 16 GiB of 8 GiB free"}


def test_repetitions_share_the_time_alike() -> None:
    assert repetitions({"a": 10.0, "b": 10.0}, seconds=1, most=15) == {"a": 15, "b": 15}
    assert repetitions({"a": 10.0, "b": 10.0}, seconds=0.2, most=15) == {"a": 10, "b": 10}
    assert repetitions({"a": 10.0, "b": 100.0}, seconds=1.05, most=15) == {"a": 15, "b": 9}
    assert repetitions({"a": 1e4}, seconds=0, most=15) == {"a": 3}
    assert repetitions({"a": 1e4}, seconds=0, most=2) == {"a": 2}
    assert repetitions({}, seconds=1, most=2) == {}


@pytest.mark.parametrize("count", [0, 1, 3, 7, 15])
def test_a_cell_takes_part_in_rounds_spread_over_the_whole(count: int) -> None:
    chosen = rounds_of(count, 15)
    assert len(chosen) == count and chosen <= set(range(15))
    if count > 1:
        assert min(chosen) == 0 and max(chosen) >= 15 - 15 / count - 1


def test_later_lengths_get_more_of_the_time() -> None:
    assert length_share(1, [1, 4]) == pytest.approx(1 / 9) and length_share(3, [3]) == 1


def test_text_and_typed_values_give_the_same_options() -> None:
    text = make_options(
        n="2K,512", window="64, 128", methods="sa,moba:block_size=512,topk=3,full",
        backends="banded", dtype="bf16", device="cpu", heads="4", kv_heads="2", threads="1",
        budget="9.5", out="x", seed="3",
    )  # fmt: skip
    typed = make_options(
        n=(512, 2048), window=(64, 128), methods=("sa", "moba:block_size=512,topk=3", "full"),
        backends=("banded",), dtype="bfloat16", device="cpu", heads=4, kv_heads=2, threads=1,
        budget=9.5, out=Path("x"), seed=3,
    )  # fmt: skip
    assert text == typed and text.torch_dtype is torch.bfloat16
    assert text.patterns() == [SA(64), SA(128), MoBA(512, 3), Full()]


def test_a_window_may_stand_without_its_name() -> None:
    options = make_options(window="8,16", methods="sa:256,psa:264,sa:64;seed=3,swa:9+psa:8")
    assert [str(pattern) for pattern in options.patterns()] == [
        "sa:window=256,seed=0",
        "psa:window=264,seed=0",
        "sa:window=64,seed=3",
        "swa:window=9+psa:window=8,seed=0",
    ]


def test_methods_without_a_window_take_each_of_them() -> None:
    options = make_options(window="8,16", methods="sa:circular=false,seed=2,swa,moba,sa:window=5")
    assert options.patterns() == [
        *(SA(8, 2, circular=False), SA(16, 2, circular=False)),
        *(SWA(8), SWA(16), MoBA(4, 2), MoBA(8, 2), SA(5)),
    ]


def test_the_defaults_are_the_published_grid() -> None:
    options = make_options(device="cpu")
    assert options.n == (1024, 2048, 4096, 8192, 16384) and options.window == (256,)
    shape = (options.heads, options.kv_heads, options.head_dim, options.dtype)
    assert shape == (8, 2, 64, "float32") and options.budget < 300


BAD: list[tuple[dict[str, Any], str]] = [
    ({"window": "0"}, "window must be a whole number of at least 1, got 0"),
    ({"window": ""}, "window must name at least one number"),
    ({"n": "512,many"}, "n takes whole numbers such as 512 or 4K, got 'many'"),
    ({"n": "-4"}, "n must be a whole number of at least 1, got -4"),
    ({"heads": "5"}, "heads must be a multiple of kv_heads, got 5 and 2"),
    ({"heads": "five"}, "heads takes whole numbers"),
    ({"threads": "0"}, "threads must be a whole number"),
    ({"repeats": 0}, "repeats must be"),
    ({"budget": "0"}, "budget must be a positive number of seconds"),
    ({"budget": "nan"}, "budget must be a positive number of seconds"),
    ({"budget": "soon"}, "budget must be a number of seconds"),
    ({"backends": "bandit"}, "unknown backend 'bandit'; did you mean 'banded'"),
    ({"backends": ","}, "name at least one backend"),
    ({"methods": "swan"}, "unknown method 'swan'; did you mean 'swa'"),
    ({"methods": "sa:windw=4"}, "no parameter 'windw'"),
    ({"methods": "moba", "window": "33"}, "must be a multiple of topk=2"),
    ({"dtype": "float8"}, "unknown dtype 'float8'"),
    ({"device": "tpu"}, "unknown device 'tpu'"),
]


@pytest.mark.parametrize("given, says", BAD, ids=[str(given) for given, _ in BAD])
def test_bad_options_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_options(**({"device": "cpu"} | given))


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no CUDA device"):
        make_options(device="cuda")
    assert make_options().device == "cpu"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        check_folder(tmp_path / "file" / "bench")
    check_folder(tmp_path / "new" / "bench")
    assert (tmp_path / "new" / "bench").is_dir()


def test_options_cannot_be_changed() -> None:
    options: AttentionOptions = make_options(device="cpu")
    with pytest.raises(AttributeError):
        options.batch = 2  # type: ignore[misc]
