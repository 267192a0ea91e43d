"""A model and its tokenizer from one name."""

from pathlib import Path

import pytest
import torch

import sa_patch
from sa_patch.errors import UserError
from sa_patch.harness.loading import load_pretrained


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
