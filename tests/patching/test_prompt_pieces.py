"""Prompts in pieces, by `generate` and behind caches: as in one piece, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sa_patch import PSA, SA, SWA, BlockTopK, MoBA, Sinks, Tail, patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patterns import Pattern
from tests.small_models import PAD, random_tokens, tiny_model

STABLE: list[Pattern] = [
    Sinks(2) | SWA(4) | PSA(4),
    SWA(5),
    MoBA(4, 2),
    BlockTopK(2, 2, 2, 0, branch=0, shared=8, segment=8),
]
UNSTABLE: list[Pattern] = [SA(3), Tail(4) | SWA(3), Sinks(2) | SA(3)]
TOLERANCE: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4}
TOKENS = random_tokens(2, 25)
MASK = torch.ones_like(TOKENS)
MASK[1, :3] = 0
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "max_new_tokens": 4,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def write(model: PreTrainedModel, tokens: Tensor = TOKENS, **options: Any) -> tuple[Tensor, Tensor]:
    mask = options.pop("attention_mask", MASK)
    out = model.generate(tokens, attention_mask=mask, **GREEDY, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("pattern", STABLE, ids=str)
def test_generate_reads_chunks_as_one_prompt(pattern: Pattern, decode: str) -> None:
    model = patch_model(tiny_model("llama"), pattern, decode=decode)
    whole, logits = write(model)
    # The last chunk of 8 is a single token, which is prompt all the same.
    for size in (8, 11):
        tokens, chunked = write(model, prefill_chunk_size=size)
        assert torch.equal(tokens, whole)
        torch.testing.assert_close(chunked, logits, **TOLERANCE)
    if pattern.shared_queries == 1:
        static: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
        _, chunked = write(model, prefill_chunk_size=8, **static)
        torch.testing.assert_close(chunked, logits, **TOLERANCE)
    unpatch_model(model)
    stock = write(model, prefill_chunk_size=8)[1]
    assert (stock - logits).abs().max() > 0.01, "the pattern hides something here"
    assert torch.equal(stock, write(tiny_model("llama"), prefill_chunk_size=8)[1])


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("pattern", UNSTABLE, ids=str)
def test_patterns_that_need_prompts_whole_refuse_pieces(pattern: Pattern, decode: str) -> None:
    model = patch_model(tiny_model("llama"), pattern, decode=decode)
    says = "in one piece, and 8 keys are cached .* prefix-stable pattern such as sinks:4"
    with pytest.raises(UserError, match=says):
        write(model, prefill_chunk_size=8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS[:, :8], past_key_values=cache)
        with pytest.raises(UserError, match=says):
            model(TOKENS[:, 8:], past_key_values=cache)
    write(model)


def dense(tokens: Tensor, pattern: Pattern, written: range) -> Tensor:
    """Logits of the stock model under the mask that a conversation should have given."""
    n = tokens.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    prompt = [i for i in range(n) if i not in written]
    seen[prompt] = pattern.visible(torch.tensor(prompt), n)[0]
    mask = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits: Tensor = tiny_model("llama")(tokens, attention_mask=mask).logits
    return logits


@pytest.mark.parametrize("pattern", [Sinks(2) | SWA(6), SWA(5) | Sinks(3)], ids=str)
@torch.no_grad()
def test_a_second_prompt_behind_written_tokens_is_prompt(pattern: Pattern) -> None:
    model = patch_model(tiny_model("llama"), pattern)
    static = StaticCache(config=model.config, max_cache_len=40)
    for cache in (DynamicCache(config=model.config), static):
        first, ones = random_tokens(1, 17), torch.ones(1, 17, dtype=torch.int64)
        options: dict[str, Any] = {"attention_mask": ones, "disable_compile": True}
        said, _ = write(model, first, past_key_values=cache, **options)
        tokens = torch.cat([said, random_tokens(1, 9, seed=4)], 1)
        # The last token written has not been read: it comes with the second prompt, as prompt.
        expected = dense(tokens, pattern, range(17, 20))[:, 20:]
        logits = model(tokens[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        one_turn = dense(tokens, pattern, range(0))[:, 20:]
        assert (one_turn - expected).abs().max() > 0.01, "written tokens saw everything"


def test_a_single_token_that_was_written_is_no_prompt() -> None:
    """`generate` goes on from a cache that lacks the last token: SA does not refuse that."""
    model = patch_model(tiny_model("llama"), SA(3))
    cache = DynamicCache(config=model.config)
    begun, first = write(model, past_key_values=cache)
    mask = torch.cat([MASK, torch.ones(2, 4, dtype=torch.int64)], 1)
    _, more = write(model, begun, past_key_values=cache, attention_mask=mask)
    both = model.generate(TOKENS, attention_mask=MASK, **(GREEDY | {"max_new_tokens": 8}))
    torch.testing.assert_close(torch.cat([first, more]), torch.stack(both.logits), **TOLERANCE)
