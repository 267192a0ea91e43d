"""Converted copies of GGUF files: the same model and tokenizer, sooner."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sa_patch.errors import UserError
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.models import converted
from sa_patch.models.converted import converted_copy, find_copy
from sa_patch.models.embedded import resolve_model
from sa_patch.models.loading import load_pretrained
from tests.models.tiny_gguf import write_tiny_gguf
from tests.thorough import THOROUGH

# The last word once as it is written and once with a combining accent, which NFC would join.
TEXT = "Then the\tthesis: <|end|> (été) ete\u0301\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sa_patch" / "models"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "models" / "tiny.gguf")


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the source was read again")


def assert_same(path: Path, model: Any, tokenizer: Any) -> None:
    """What transformers reads from the file itself is expected."""
    given = {"gguf_file": path.name}
    stock = AutoModelForCausalLM.from_pretrained(path.parent, **given).state_dict()
    held = model.state_dict()
    assert list(held) == list(stock)
    assert all(torch.equal(held[name], tensor) for name, tensor in stock.items())
    expected = AutoTokenizer.from_pretrained(path.parent, **given)
    assert tokenizer(TEXT).input_ids == expected(TEXT).input_ids
    # lm-eval takes a token for padding where there is none.
    assert expected.special_tokens_map.items() <= tokenizer.special_tokens_map.items()


def test_a_copy_is_the_same_model_and_is_made_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_pretrained(str(tiny))
    assert_same(tiny, *first)
    copy = find_copy(resolve_model(str(tiny)))
    assert copy is not None and not list(copy.parent.glob("*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", refuse)
        again = load_pretrained(str(tiny), dtype="bfloat16")
        measured = SAPatchLM(str(tiny), method="full", device="cpu", dtype="float32")
    assert again[0].dtype == torch.bfloat16 and not hasattr(again[0].config, "quantization_config")
    assert_same(tiny, measured.model, measured.tokenizer)
    half = AutoModelForCausalLM.from_pretrained(
        tiny.parent, gguf_file=tiny.name, dtype=torch.bfloat16
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(again[0].state_dict()[name], half.state_dict()[name])


def test_a_changed_source_has_a_copy_of_its_own(tiny: Path) -> None:
    load_pretrained(str(tiny))
    write_tiny_gguf(tiny, seed=1)
    assert find_copy(resolve_model(str(tiny))) is None
    assert_same(tiny, *load_pretrained(str(tiny)))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "manifest.json", "tokenizer/tokenizer.json", "config.json"]
)
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_damaged_copy_is_made_anew(tiny: Path, file: str, harm: str) -> None:
    copy = converted_copy(resolve_model(str(tiny)))
    assert copy is not None
    content = bytearray((copy / file).read_bytes())
    content[-9] ^= 1
    whole = (copy / "model.safetensors").read_bytes()
    (copy / file).unlink()
    if harm != "gone":
        (copy / file).write_bytes(content if harm == "changed" else content[:-9])
    assert find_copy(resolve_model(str(tiny))) is None
    assert converted_copy(resolve_model(str(tiny))) == copy
    assert (copy / "model.safetensors").read_bytes() == whole


def test_where_nothing_can_be_kept_the_file_itself_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert_same(tiny, *load_pretrained(str(tiny)))


def test_no_copy_is_made_on_a_full_disk_nor_of_a_large_file(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tiny)._replace(free=tiny.stat().st_size)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        assert converted_copy(resolve_model(str(tiny))) is None
    monkeypatch.setattr(converted, "LARGEST_FILE", 100)
    assert converted_copy(resolve_model(str(tiny))) is None
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("what", ["_same_model", "_same_tokenizer"])
def test_a_copy_that_would_differ_is_not_kept_nor_tried_again(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(converted, what, lambda *_: False)
        assert converted_copy(resolve_model(str(tiny))) is None
    assert not list(cache.rglob("*.safetensors"))
    monkeypatch.setattr(converted, "_write", refuse)
    assert_same(tiny, *load_pretrained(str(tiny)))


def test_what_the_loader_cannot_read_is_still_refused_with_its_reason(tmp_path: Path) -> None:
    foreign = write_tiny_gguf(tmp_path / "foreign.gguf", family="unheard-of")
    with pytest.raises(UserError, match="could not be loaded.*unheard-of"):
        load_pretrained(str(foreign))


def test_any_difference_is_seen(tiny: Path) -> None:
    (model, tokenizer), (other, odd) = load_pretrained(str(tiny)), load_pretrained(str(tiny))
    assert converted._same_model(model, other) and converted._same_tokenizer(tokenizer, odd)
    odd.backend_tokenizer.normalizer = normalizers.NFC()
    other.model.norm.weight.data[3] += 1
    assert not converted._same_tokenizer(tokenizer, odd)
    assert not converted._same_model(model, other)
    # The weights may be the file's own pages: what a user does to them stays out of it.
    assert converted._same_model(model, load_pretrained(str(tiny))[0])


@pytest.mark.skipif(not THOROUGH, reason="imports torch twice; set HYPOTHESIS_PROFILE=thorough")
def test_two_processes_make_one_copy(tiny: Path, cache: Path) -> None:
    code = (
        "import sys, torch; from sa_patch.models.loading import load_pretrained; "
        "print(float(load_pretrained(sys.argv[1])[0].lm_head.weight.double().sum()))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tiny)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1] and float(answers[0])
    assert len(list(cache.rglob("*.safetensors"))) == 1 and not list(cache.glob("*/*.tmp"))
