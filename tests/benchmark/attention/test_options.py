"""Options of a benchmark of attention: text and typed values, defaults, and bad ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.benchmark.attention.options import AttentionOptions, make_options
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, Full, MoBA


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


def test_options_cannot_be_changed() -> None:
    options: AttentionOptions = make_options(device="cpu")
    with pytest.raises(AttributeError):
        options.batch = 2  # type: ignore[misc]
