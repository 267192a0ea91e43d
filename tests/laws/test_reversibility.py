"""Law 5: unpatching gives the untouched model back, and a patched state never leaks.

Seen red when unpatching left the layer plans, always went back to sdpa, or the configuration stayed
shared or gained a field; when `patched` did not restore after an exception or when nested; when a
bad backend was found out only after patching.
"""

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sa_patch import patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, MoBA, Pattern
from tests.laws.drawn import MODEL_METHODS, MODEL_SPARSE_METHODS, narrow_pattern
from tests.small_models import FAMILIES, build, random_tokens, tiny_config, tiny_model

TOKENS = random_tokens(2, 30)
MASK = torch.ones_like(TOKENS).index_fill_(1, torch.arange(4), 0)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits of a plain and of a left-padded batch, in one tensor."""
    return torch.cat([model(TOKENS).logits, model(TOKENS, attention_mask=MASK).logits[:, 4:]], 1)


def attributes(model: PreTrainedModel) -> dict[str, set[str]]:
    """Names of everything that hangs on each module."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_restores_the_model_bit_for_bit(family: str, stock: str, method: str) -> None:
    model = tiny_model(family, attn_implementation=stock)
    before, bare = logits(model), attributes(model)
    config = model.config.to_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    assert patch_model(model, narrow_pattern(method)) is model
    logits(model)
    patch_model(model, SA(2, seed=5), decode="pattern", layers=[1])
    logits(model)
    assert unpatch_model(model) is model

    assert torch.equal(logits(model), before)
    assert attributes(model) == bare
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == stock
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(unpatch_model(model)), before), "unpatching twice is harmless"


@pytest.mark.parametrize("method", MODEL_SPARSE_METHODS)
def test_the_last_pattern_counts_in_every_layer(method: str) -> None:
    once = logits(patch_model(tiny_model("llama"), narrow_pattern(method)))
    model = patch_model(tiny_model("llama"), SWA(2), layers=[0, 2], decode="pattern")
    assert torch.equal(logits(patch_model(model, narrow_pattern(method))), once)


@pytest.mark.parametrize("inner", [SWA(2), MoBA(2), None], ids=str)
def test_patched_restores_what_was_there_even_after_an_exception(inner: Pattern | None) -> None:
    model = tiny_model("qwen3")
    stock = logits(model)
    with pytest.raises(RuntimeError, match="inside"), patched(model, SA(3)):
        outer = logits(model)
        assert not torch.equal(outer, stock)
        if inner is not None:
            with patched(model, inner, decode="pattern", layers=[1]):
                assert not torch.equal(logits(model), outer)
            assert torch.equal(logits(model), outer), "nested: the outer pattern comes back"
        raise RuntimeError("inside")
    assert torch.equal(logits(model), stock)


def test_a_refused_patch_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3")
    stock = logits(model)
    refused: list[dict] = [{"layers": [7]}, {"backend": "bandid"}, {"decode": "sparse"}]
    for options in refused:
        with pytest.raises(UserError):
            patch_model(model, SA(3), **options)
        with pytest.raises(UserError), patched(model, SA(3), **options):
            pass
        assert torch.equal(logits(model), stock)
    sparse = logits(patch_model(model, SA(3)))
    for options in refused:
        with pytest.raises(UserError):
            patch_model(model, SWA(9), **options)
        assert torch.equal(logits(model), sparse)


@pytest.mark.parametrize("shared_config", [True, False])
def test_two_models_hold_different_patterns(shared_config: bool) -> None:
    alone = {
        str(pattern): logits(patch_model(tiny_model("qwen3"), pattern))
        for pattern in (SA(3), SWA(4))
    }
    stock = logits(tiny_model("qwen3"))
    config = tiny_config("qwen3")
    configs = [config if shared_config else copy.deepcopy(config) for _ in range(3)]
    first, second, third = (build("qwen3", each) for each in configs)
    patch_model(first, SA(3))
    patch_model(second, SWA(4))
    for _ in range(2):
        assert torch.equal(logits(first), alone["sa:window=3,seed=0"])
        assert torch.equal(logits(second), alone["swa:window=4"])
        assert torch.equal(logits(third), stock)
    unpatch_model(first)
    assert torch.equal(logits(first), stock)
    assert torch.equal(logits(second), alone["swa:window=4"])
    assert torch.equal(logits(build("qwen3", configs[2])), stock), "nor into models built later"


def test_copies_are_patched_and_unpatched_by_themselves() -> None:
    model = tiny_model("llama")
    stock = logits(model)
    sparse = logits(patch_model(model, SA(3)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), sparse)
        assert torch.equal(logits(unpatch_model(other)), stock)
        assert torch.equal(logits(model), sparse)
        patch_model(other, SWA(2))
        assert torch.equal(logits(unpatch_model(copy.deepcopy(other))), stock)
        assert torch.equal(logits(model), sparse)
    assert torch.equal(logits(unpatch_model(model)), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_of_a_patched_model_writes_the_stock_files(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    stock = logits(model)
    model.save_pretrained(tmp_path / "stock")
    patch_model(model, SA(3, seed=1), layers=[1], decode="pattern")
    model.save_pretrained(tmp_path / "patched")
    assert model.config._attn_implementation != "sdpa", "saving does not unpatch"

    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in names:
        first, second = (tmp_path / folder / name for folder in ("stock", "patched"))
        if name.endswith(".json"):
            assert json.loads(first.read_text()) == json.loads(second.read_text())
            assert "sa_patch" not in second.read_text()
        else:
            assert first.read_bytes() == second.read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(logits(loaded), stock)


def test_a_patched_model_can_be_collected() -> None:
    """Nothing global keeps a model, or what its layers saw, alive."""
    model = patch_model(tiny_model("qwen3"), SA(3))
    logits(model)
    marker = weakref.ref(model)
    del model
    gc.collect()
    assert marker() is None
