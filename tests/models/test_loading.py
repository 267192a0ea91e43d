"""A model and its tokenizer from one name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sa_patch
from sa_patch.errors import UserError
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.models.embedded import resolve_model
from sa_patch.models.loading import load_pretrained
from tests.models.tiny_gguf import write_tiny_gguf


def test_a_folder_is_loaded_ready_to_be_patched(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_pretrained(str(checkpoint), dtype="float64")
    assert (model.dtype, model.training) == (torch.float64, False)
    tokens = tokenizer("the sea is calm today", return_tensors="pt").input_ids
    with torch.no_grad():
        stock = model(tokens).logits
        with sa_patch.patched(model, window=2):
            assert not torch.equal(model(tokens).logits, stock)
        assert torch.equal(model(tokens).logits, stock)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_the_weights_keep_their_own_type_by_default(checkpoint: Path) -> None:
    model, _ = load_pretrained(str(checkpoint))
    assert model.dtype == torch.float32


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2-135m'"):
        load_pretrained("smollm2-135")
    with pytest.raises(UserError, match="no model at"):
        load_pretrained(str(tmp_path / "none"))
    with pytest.raises(UserError, match="revision"):
        load_pretrained(str(checkpoint), revision="abc")


def test_the_embedded_models_weights_are_those_of_its_file() -> None:
    gguf = pytest.importorskip("gguf")
    model, _ = load_pretrained("smollm2-135m")
    source = resolve_model("smollm2-135m")
    file = Path(source.pretrained) / str(source.gguf_file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    held = model.state_dict()
    for name, own in {
        "token_embd": "embed_tokens",
        "blk.29.ffn_down": "layers.29.mlp.down_proj",
        "blk.17.attn_v": "layers.17.self_attn.v_proj",
    }.items():
        tensor = stored[f"{name}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(held[f"model.{own}.weight"], expected)


@pytest.mark.parametrize("load", [load_pretrained, SAPatchLM])
def test_a_file_without_converted_copy_is_read_once(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    read: list[Any] = []

    def counted(path: str) -> Any:
        read.append(reader(path))
        return read[-1]

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", "nowhere")
    load(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert len(read) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (counted, names)
