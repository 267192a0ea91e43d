"""Fractional attention in modules and models: projections, causality, padding, saving, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sa_patch import SWA, patch_model
from sa_patch.errors import UserError
from sa_patch.patterns import SA
from sa_patch.training import FractionalAttention, fractional_attention, fractional_model
from sa_patch.training.fractional.models import (
    FractionalLlamaAttention,
    draw_patterns,
    fractional_attention_forward,
)
from sa_patch.training.pretraining.loop import pretrain
from sa_patch.training.pretraining.methods import Method, build_model, set_attention
from sa_patch.training.pretraining.run_folder import run_name
from sa_patch.training.pretraining.settings import load_settings
from tests.small_models import random_tokens, tiny_model
from tests.training.tiny_run import write_config

PATTERNS = ("full", "sinks:1+swa:4", "sa:4,seed=3")
TOLERANCE = 2e-5  # absolute, of float32 logits of about 1: sums in another order


def fractional(pattern: str = "full", alpha: float = 1.2, **options: Any) -> Any:
    return fractional_model(tiny_model("llama"), alpha, pattern=pattern, **options).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    out: Tensor = model(tokens, **arguments).logits
    return out


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_module_is_the_function_between_its_projections(shared: bool, orthonormal: bool) -> None:
    torch.manual_seed(0)
    module = FractionalAttention(
        12, 2, 4, 1.2, shared=shared, orthonormal=orthonormal, pattern=SWA(3), causal=True
    )
    x = torch.randn(2, 9, 12)
    q, k, v = (
        (x @ each.weight.T).view(2, 9, 2, 4).transpose(1, 2)
        for each in (module.q_proj, module.k_proj or module.q_proj, module.v_proj)
    )
    out = fractional_attention(q, k, v, 1.2, exclude_self=shared, pattern=SWA(3))
    wanted = out.transpose(1, 2).flatten(2) @ module.o_proj.weight.T
    assert torch.allclose(module(x), wanted, atol=1e-6)
    gram = module.q_proj.weight @ module.q_proj.weight.T
    assert torch.allclose(gram, torch.eye(8), atol=1e-5) == orthonormal
    assert shared == (module.k_proj is None)


@pytest.mark.parametrize("alpha", [None, 1.0, 2.0])
def test_a_module_ignores_padding(alpha: float | None) -> None:
    torch.manual_seed(0)
    module = FractionalAttention(12, 2, 4, alpha, shared=True)
    x = torch.randn(2, 9, 12)
    real = torch.arange(9) < torch.tensor([[9], [5]])
    found = module(x, real)
    assert torch.allclose(found[1, :5], module(x[1:, :5])[0], atol=1e-6)
    assert not found[1, 5:].any()
    # One token, which sees nothing.
    assert not module(x[:, :1]).any()


def test_dot_products_are_softmax_attention() -> None:
    torch.manual_seed(0)
    module = FractionalAttention(6, 1, 6, None)
    assert module.k_proj is not None
    x = torch.randn(1, 7, 6)
    scores = module.q_proj(x) @ module.k_proj(x).transpose(1, 2) / 6**0.5
    wanted = module.o_proj(scores.softmax(-1) @ module.v_proj(x))
    assert torch.allclose(module(x), wanted, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_is_causal_and_does_not_see_padding(pattern: str) -> None:
    model = fractional(pattern)
    tokens = random_tokens(2, 14)
    alone = logits(model, tokens)
    if "sa:" not in pattern:
        changed = tokens.clone()
        changed[:, 9:] = changed[:, 9:] % 7 + 5
        assert torch.allclose(logits(model, changed)[:, :9], alone[:, :9], atol=TOLERANCE)
    for left in (True, False):
        padded = torch.zeros(2, 18, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        place = slice(4, None) if left else slice(0, 14)
        padded[:, place], mask[:, place] = tokens, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = logits(model, padded, attention_mask=mask, position_ids=positions)
        assert torch.allclose(found[:, place], alone, atol=TOLERANCE)


def test_a_pattern_and_an_alpha_make_a_difference() -> None:
    tokens = random_tokens(2, 14)
    found = [logits(fractional(p, a), tokens) for p in PATTERNS for a in (1.2, 2.0)]
    found += [logits(tiny_model("llama").eval(), tokens)]
    for i, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-3 for other in found[:i])


@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_cached_tokens_give_what_one_pass_gives(pattern: str) -> None:
    model, tokens = fractional(pattern), random_tokens(2, 12)
    whole = logits(model, tokens)
    with torch.no_grad():
        first = model(tokens[:, :8], use_cache=True)
        second = model(tokens[:, 8:], past_key_values=first.past_key_values)
    assert torch.allclose(second.logits, whole[:, 8:], atol=TOLERANCE)


def test_it_saves_and_loads_as_what_it_is(tmp_path: Path) -> None:
    model, tokens = fractional("sa:4,seed=3", 1.6, geometry="geodesic"), random_tokens(1, 10)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_patch_model_leaves_it_alone() -> None:
    model, tokens = fractional("swa:4"), random_tokens(1, 10)
    before = logits(model, tokens)
    with pytest.raises(UserError, match="trained with patterns of its own"):
        patch_model(model, SWA(2))
    assert torch.equal(logits(patch_model(model, "full"), tokens), before)


def test_methods_read_their_text_forms() -> None:
    texts = {
        "fna": "fna:alpha=1.2",
        "fna:1.6": "fna:alpha=1.6",
        "fna:alpha=2,pattern=sa:64": "fna:alpha=2,pattern=sa:window=64",
        "fna:pattern=swa": "fna:alpha=1.2,pattern=swa:window=8",
        "fna:alpha=1,geometry=geodesic": "fna:alpha=1,geometry=geodesic",
    }
    for text, wanted in texts.items():
        method = Method.read(text, 8)
        assert str(method) == wanted and Method.read(str(method), 99) == method
        assert method.has_own_attention and method.kernel is not None
    assert run_name(str(Method.read("fna:2,pattern=sa:4", 8)), 1) == (
        "fna-alpha=2-pattern=sa-window=4-seed1"
    )
    for text in (
        "fna:alpha=3", "fna:x", "fna:beta=1", "fna:1.2,1.6", "fna:density=1", "fna:pattern=",
        "fna:1.2,pattern=gated", "fna:1.2,pattern=fna", "fna:1.2pattern=sa:4",
        "fna:1.2,pattern=moba:4,2", "fna:1.2,pattern=sa:4,seed=2", "fna:1.2,geometry=flat",
    ):  # fmt: skip
        with pytest.raises(UserError):
            Method.read(text, 8)


def test_random_patterns_are_drawn_anew_in_each_step(tmp_path: Path) -> None:
    settings = load_settings(write_config(tmp_path))
    method = Method.read("fna:1.2,pattern=sa:8", 8)
    model: Any = build_model(method, settings, 600, seed=4)
    layers = [m for m in model.modules() if isinstance(m, FractionalLlamaAttention)]
    assert len(layers) == 2 and layers[0].pattern == SA(8, 4)
    seen = []
    for step in (0, 1, None):
        set_attention(model, method, settings, 4, step)
        seen.append(layers[0].drawn)
    assert seen[0] != seen[1] and seen[2] is None
    draw_patterns(model, 9)
    assert layers[1].drawn == SA(8, 9)
    stock = build_model(Method.read("full", 8), settings, 600, seed=4).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stock[name])


def test_a_run_learns(tmp_path: Path) -> None:
    settings = load_settings(write_config(tmp_path))
    method = Method.read("fna:alpha=1.6,geometry=geodesic,pattern=sa", settings.window)
    result = pretrain(settings, method, 0, tmp_path / "run", tmp_path / "c", ["test"]).result()
    losses = [entry["validation_loss"] for entry in result["log"] if "validation_loss" in entry]
    assert losses[1] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.fractional_alpha == 1.6


def test_a_layer_attends_by_the_pattern_that_was_drawn_for_it() -> None:
    model, tokens = fractional("sa:4,seed=3"), random_tokens(1, 14)
    layer = [m for m in model.modules() if isinstance(m, FractionalLlamaAttention)][1]
    q, k, v = torch.randn(3, 1, 4, 14, 8, generator=torch.Generator().manual_seed(0))
    found, _ = fractional_attention_forward(layer, q, k, v, None)
    wanted = fractional_attention(q, k, v, 1.2, pattern=SA(4, 3), layer=1)
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-6)
    draw_patterns(model, 9)
    drawn = logits(model, tokens)
    assert torch.equal(drawn, logits(fractional("sa:4,seed=9"), tokens))
