"""Gated SA + SWA: what it computes, its gradients, its permutations, and saving and loading it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sa_patch import SA, SWA, patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.training import gated_config, gated_model
from sa_patch.training.gated.attention import LlamaGatedSA, gated_attention_forward
from sa_patch.training.gated.models import gate_layers
from tests.laws.test_cost import LargestTensor
from tests.small_models import random_tokens, tiny_config, tiny_model

FAMILIES = ("llama", "qwen3")


def gated(family: str = "llama", window: int = 4, seed: int = 3, **options: Any) -> Any:
    """A gated model in evaluation mode whose gates are far from all alike."""
    model = gated_model(tiny_model(family), window, seed=seed, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gate_layers(model):
            layer.gate_proj.bias.copy_(torch.randn(8, generator=generator))
            weight = layer.gate_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return model.eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    out: Tensor = model(tokens, **arguments).logits
    return out


@pytest.mark.parametrize("backend", ["banded", "reference"])
def test_gradients_pass_gradcheck_in_float64(backend: str) -> None:
    stock = LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    config = gated_config(stock, 3, seed=1, backend=backend)
    config._attn_implementation = "sa_patch_gated"
    torch.manual_seed(0)
    module = LlamaGatedSA(config, 0).double()
    rope = LlamaRotaryEmbedding(config)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    positions = rope(hidden, torch.arange(7)[None])
    names = [name for name, _ in module.named_parameters()]
    assert "gate_proj.weight" in names and "q_proj.weight" in names

    def forward(hidden: Tensor, *parameters: Tensor) -> Tensor:
        arguments = {"position_embeddings": positions, "attention_mask": None}
        out = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (hidden,), arguments
        )
        first: Tensor = out[0]
        return first

    inputs = (hidden, *(each.detach().clone() for each in module.parameters()))
    assert torch.autograd.gradcheck(forward, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_gated_sum_of_its_branches(family: str) -> None:
    """By dense masks and a softmax written out, in float64."""
    model = gated(family).double()
    layer = gate_layers(model)[1]
    config, seq_len = model.config, 17
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, seq_len, config.head_dim, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(q[:, :2].shape, generator=generator, dtype=q.dtype) for _ in range(2))
    hidden = torch.randn(2, seq_len, config.hidden_size, generator=generator, dtype=q.dtype)
    out, _ = gated_attention_forward(layer, q, k, v, None, gates=layer.gates(hidden))

    gate = torch.sigmoid(hidden @ layer.gate_proj.weight.T + layer.gate_proj.bias)
    causal = torch.ones(seq_len, seq_len).tril().bool()
    scores = q @ k.repeat_interleave(2, 1).mT / config.head_dim**0.5
    expected: Tensor | float = 0.0
    for branch, pattern in enumerate((SA(4, seed=3), SWA(4))):
        seen = pattern.visible(torch.arange(seq_len), seq_len, layer=1) & causal
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        own = gate[:, :, 4 * branch : 4 * branch + 4].transpose(1, 2)[..., None]
        expected = expected + own * (weights @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_both_branches_get_gradients_from_the_model_loss() -> None:
    model = gated().train()
    tokens = random_tokens(2, 20)
    model(tokens, labels=tokens).loss.backward()
    for layer in gate_layers(model):
        heads = layer.gate_proj.bias.grad.unflatten(0, (2, 4))  # type: ignore[union-attr]
        assert bool((heads.abs() > 1e-6).all())


def test_two_half_open_gates_over_a_whole_window_are_full_attention() -> None:
    stock = tiny_model("llama", num_hidden_layers=1)
    model = gated_model(stock, 40)
    with torch.no_grad():
        layer = gate_layers(model)[0]
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.zero_()  # each gate is 1/2, and 1/2 + 1/2 is the stock attention
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(logits(model, tokens), logits(stock, tokens))


def test_training_draws_fresh_permutations_and_evaluation_does_not() -> None:
    model = gated()
    tokens = random_tokens(1, 24)
    assert torch.equal(logits(model, tokens), logits(model, tokens))
    model.train()
    first, second = logits(model, tokens), logits(model, tokens)
    assert not torch.allclose(first, second, atol=1e-3)
    # The number of passes is the whole state: set back, the same permutations come again.
    model.training_passes.zero_()
    assert torch.equal(logits(model, tokens), first)
    assert torch.equal(logits(model.eval(), tokens), logits(gated(), tokens))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = random_tokens(2, 20)
    found = []
    calls: list[int] = []
    for recomputed in (False, True):
        model = gated().train()
        if recomputed:
            model.activation_checkpointing_enable()
            layer = model.model.layers[0].self_attn
            layer.gate_proj.register_forward_hook(lambda *_: calls.append(1))
        # Two passes before the backward ones, as with gradient accumulation.
        losses = [model(tokens, labels=tokens, use_cache=False).loss for _ in range(2)]
        sum(losses).backward()
        found.append([each.grad for each in model.parameters()])
    assert len(calls) == 4  # each pass once more in the backward pass
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    model = gated(family, swa_window=2, circular=False)
    tokens = random_tokens(2, 20)
    model.train()
    logits(model, tokens)
    before = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens), before)
    # Training goes on with the permutations that would have been next.
    assert torch.equal(logits(again.train(), tokens), logits(model.train(), tokens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = gated()
    tokens = random_tokens(1, 12)
    padding = torch.zeros(1, 5, dtype=torch.int64)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    real = slice(5, None) if side == "left" else slice(0, 12)
    batch = torch.cat([torch.cat(parts, 1), random_tokens(1, 17, seed=1)])
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[0] = torch.cat([torch.full_like(part, part is tokens) for part in parts], 1)
    together = logits(model, batch, attention_mask=mask)
    torch.testing.assert_close(together[:1, real], logits(model, tokens))


@pytest.mark.parametrize("backend", ["auto", "banded", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@given(
    seq_len=st.integers(2, 40),
    window=st.integers(1, 12),
    where=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_logits_before_a_changed_token_are_bit_identical(
    family: str, backend: str, seq_len: int, window: int, where: float, seed: int
) -> None:
    model = gated(family, window, seed, backend=backend)
    tokens = random_tokens(2, seq_len, seed=seed)
    place = round(where * (seq_len - 1))
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] - 3 + 7) % 61 + 3
    before, after = logits(model, tokens), logits(model, changed)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


@given(
    seq_len=st.integers(1, 40),
    window=st.integers(1, 12),
    ragged=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backends_agree(seq_len: int, window: int, ragged: bool, seed: int) -> None:
    tokens, mask = random_tokens(2, seq_len, seed=seed), torch.ones(2, seq_len, dtype=torch.int64)
    if ragged:
        mask[0, : seq_len // 2] = 0
    found = [
        logits(gated("llama", window, seed, backend=backend), tokens, attention_mask=mask)
        for backend in ("banded", "reference")
    ]
    torch.testing.assert_close(*(each * mask[..., None] for each in found))


def test_no_tensor_is_of_size_n_squared() -> None:
    n = 4096
    stock = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=n)
    model = gated_model(stock, 16).eval()
    with LargestTensor() as seen:
        logits(model, random_tokens(1, n), logits_to_keep=1)
    assert seen.elements < n * n / 2


def test_a_decoded_token_sees_what_it_would_as_the_last_of_a_prompt() -> None:
    # Of one layer, so that no cached key depends on an attention before it.
    model = gated_model(tiny_model("llama", num_hidden_layers=1), 4, seed=3)
    tokens = random_tokens(1, 24)
    start = model(tokens[:, :20], use_cache=True)
    cache = start.past_key_values
    for n in range(21, 25):
        step = logits(model, tokens[:, n - 1 : n], past_key_values=cache)
        torch.testing.assert_close(step[:, -1], logits(model, tokens[:, :n])[:, -1])


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "window": (tiny_config("llama"), {"window": 0}, "window must be"),
    "second window": (tiny_config("llama"), {"window": 4, "swa_window": -1}, "window must be"),
    "backend": (tiny_config("llama"), {"window": 4, "backend": "bandd"}, "unknown backend"),
    "family": (tiny_config("mistral"), {"window": 4}, "llama and qwen3"),
    "dropout": (tiny_config("llama", attention_dropout=0.1), {"window": 4}, "dropout"),
    "sliding": (
        Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        {"window": 4},
        "sliding-window layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_before_a_model_is_built(case: str) -> None:
    config, options, says = BAD[case]
    with pytest.raises(UserError, match=says):
        gated_config(config, **options)


def test_no_other_pattern_takes_its_place_in_silence() -> None:
    model = gated()
    tokens = random_tokens(1, 20)
    before = logits(model, tokens)
    with pytest.raises(UserError, match="patterns of its own"):
        patch_model(model, SWA(4))
    assert torch.equal(logits(patch_model(model, "full"), tokens), before)
    assert torch.equal(logits(unpatch_model(model), tokens), before)
