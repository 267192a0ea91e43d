"""A model spread by accelerate's hooks, which move every argument of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from sa_patch import SA, SWA, patch_model, unpatch_model
from sa_patch.patching.mask import SparseMask, sparse_mask
from sa_patch.patterns import Pattern
from tests.small_models import PAD, random_tokens, tiny_model


@pytest.mark.parametrize("spread", ["cpu", "disk"])
def test_offloaded_layers_give_the_same_logits(spread: str, tmp_path: Path) -> None:
    tokens = random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    for pattern, layers in ((SA(4), None), (SWA(4), [1])):
        model = patch_model(tiny_model("llama"), pattern, layers=layers)
        with torch.no_grad():
            expected = model(tokens, attention_mask=mask).logits
        if spread == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("room", [None, "60KB"], ids=["all in memory", "some on disk"])
@pytest.mark.parametrize(("pattern", "decode"), [(SA(4), "full"), (SWA(4), "pattern")], ids=str)
@torch.no_grad()
def test_a_model_loaded_with_device_map_auto(
    pattern: Pattern, decode: str, room: str | None, tmp_path: Path
) -> None:
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    whole = tiny_model("llama")
    whole.save_pretrained(tmp_path / "model")
    spread: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory=None if room is None else {"cpu": room},
        offload_folder=tmp_path / "offloaded",
    )
    assert ("disk" in getattr(spread, "hf_device_map", {}).values()) == (room is not None)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "max_new_tokens": 8}

    def results(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(tokens, attention_mask=mask).logits[mask.bool()]
        return logits, model.generate(tokens, attention_mask=mask, **options)

    stock = results(spread)
    expected = results(patch_model(whole, pattern, decode=decode))
    ours = results(patch_model(spread, pattern, decode=decode))
    torch.testing.assert_close(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert not torch.allclose(ours[0], stock[0], atol=1e-2)
    after = results(unpatch_model(spread))
    assert torch.equal(after[0], stock[0]) and torch.equal(after[1], stock[1])


def mask_arguments(**change: Any) -> dict[str, Any]:
    from transformers.masking_utils import causal_mask_function

    arguments = {
        "batch_size": 1,
        "q_length": 4,
        "kv_length": 4,
        "q_offset": 0,
        "kv_offset": 0,
        "mask_function": causal_mask_function,
        "attention_mask": torch.tensor([[False, True, True, True]]),
        "allow_is_causal_skip": True,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return arguments | change


def test_a_mask_moves_with_its_layer() -> None:
    # No second device here: the meta device stands for it.
    mask = sparse_mask(**mask_arguments())
    packing = mask.packing()
    assert isinstance(mask.stock("sdpa"), torch.Tensor)
    moved = mask.to(torch.device("meta"))
    assert isinstance(moved, SparseMask)
    assert moved.stock("sdpa").device.type == "meta"
    assert moved.packing() is packing
    assert mask.to("cpu") is mask
    assert mask.stock("sdpa").device.type == "cpu"
