"""Layers that share the keys of earlier ones, of which Gemma 4 computes the last queries alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from sa_patch import SA, SWA, MoBA, Sinks, patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns
from sa_patch.patching.cache import SPARE_TOKENS
from sa_patch.patching.mask import SparseMask
from sa_patch.patterns import Pattern, parse_pattern
from tests.patching.dense_oracle import oracle_logits
from tests.patching.families import build
from tests.small_models import random_tokens

TOKENS = random_tokens(2, 50)
# Layers 2 and 3 take the keys of 0 and 1.
OWN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 6,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


GEMMA_3N: dict[str, Any] = {"laurel_rank": 8, "altup_num_inputs": 2}


def sharing_model(stock: str = "sdpa", family: str = "gemma4_text") -> PreTrainedModel:
    model = build(family, OWN | (GEMMA_3N if family == "gemma3n_text" else {}))
    model.set_attn_implementation(stock)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS, **arguments: Any) -> Tensor:
    found: Tensor = model(tokens, **arguments).logits
    return found


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_a_pattern_that_hides_nothing_gives_the_stock_model(stock: str) -> None:
    model = sharing_model(stock)
    kept = {count: logits(model, logits_to_keep=count) for count in (0, 1, 3)}
    padding = torch.ones_like(TOKENS).index_fill_(1, torch.arange(5), 0)
    padding[1] = 1
    rows: dict[str, Any] = {"attention_mask": padding, "logits_to_keep": 2}
    padded, written = logits(model, **rows), model.generate(TOKENS, **GREEDY)
    for layers in ([1], [3], [1, 3]):
        patch_model(model, SWA(4096), layers=layers)
        for count, expected in kept.items():
            found = logits(model, logits_to_keep=count)
            torch.testing.assert_close(found, expected, **TOLERANCE)
        torch.testing.assert_close(logits(model, **rows), padded, **TOLERANCE)
        assert torch.equal(model.generate(TOKENS, **GREEDY), written)
        static = model.generate(TOKENS, cache_implementation="static", **GREEDY)
        assert torch.equal(static, written)
    assert torch.equal(logits(unpatch_model(model)), kept[0])


def test_the_last_query_sees_no_empty_places_of_a_static_cache() -> None:
    model = sharing_model()
    stock = logits(model, logits_to_keep=1)
    # Layer 3 keeps its stock attention.
    patch_model(model, SWA(4096), layers=[1])
    cache = StaticCache(config=model.config, max_cache_len=64)
    found = logits(model, past_key_values=cache, logits_to_keep=1)
    torch.testing.assert_close(found, stock, **TOLERANCE)


@pytest.mark.parametrize("pattern", [SWA(4), SA(5), Sinks(2) | SWA(4), MoBA(4, 2)], ids=str)
@pytest.mark.parametrize("layers", [[1], [3], None], ids=["giving", "taking", "both"])
def test_the_last_queries_see_what_they_see_among_all(
    pattern: Pattern, layers: list[int] | None
) -> None:
    model = sharing_model()
    stock = logits(model)
    patch_model(model, pattern, layers=layers)
    patterns = layer_patterns(model)
    found = {count: logits(model, logits_to_keep=count) for count in (0, 1, 3)}
    expected = oracle_logits(model, TOKENS, patterns)
    for count, kept in found.items():
        torch.testing.assert_close(kept, expected[:, -count:], **TOLERANCE)
        assert (kept - stock[:, -count:]).abs().max() > 0.1
    # What generate() writes first is behind the last query of a prompt.
    patch_model(model, pattern, layers=layers)
    first = model.generate(TOKENS, max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(first, expected[:, -1].argmax(-1))


def test_padding_and_pieces_do_not_change_the_last_queries() -> None:
    model = patch_model(sharing_model(), Sinks(2) | SWA(4))
    whole = logits(model, logits_to_keep=1)
    padded = torch.nn.functional.pad(TOKENS, (7, 0))
    mask = torch.nn.functional.pad(torch.ones_like(TOKENS), (7, 0))
    found = logits(model, padded, attention_mask=mask, logits_to_keep=1)
    torch.testing.assert_close(found, whole, **TOLERANCE)
    with torch.no_grad():
        begun = model(TOKENS[:, :30], logits_to_keep=1)
    rest: dict[str, Any] = {"past_key_values": begun.past_key_values, "logits_to_keep": 1}
    torch.testing.assert_close(logits(model, TOKENS[:, 30:], **rest), whole, **TOLERANCE)
    patch_model(model, SA(5))
    with torch.no_grad():
        begun = model(TOKENS[:, :30], logits_to_keep=1)
    with pytest.raises(UserError, match="30 keys are cached"):
        model(TOKENS[:, 30:], past_key_values=begun.past_key_values, logits_to_keep=1)


NEAR, SINKS, WIDE = SWA(4), Sinks(2) | SWA(4), SWA(16)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ({1: SINKS, 3: SINKS}, 2 + 3),
        ({1: NEAR, 3: SINKS}, 2 + 3),
        ({1: SINKS, 3: WIDE}, 2 + 15),
        ({1: WIDE, 3: NEAR}, 15),
        ({1: NEAR}, None),
        ({1: NEAR, 3: MoBA(4, 2)}, None),
        ({3: NEAR}, None),
    ],
    ids=["one", "sinks", "wider", "narrower", "stock", "unbounded", "taking alone"],
)
def test_generated_tokens_see_the_pattern_and_layers_keep_what_takers_need(
    family: str, layers: dict[int, Pattern], kept: int | None
) -> None:
    model = patch_model(sharing_model(family=family), layers=layers, decode="pattern")
    patterns, total = layer_patterns(model), TOKENS.shape[1]
    out = model.generate(TOKENS, output_logits=True, return_dict_in_generate=True, **GREEDY)
    expected = oracle_logits(model, out.sequences, patterns)[:, total - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)
    # The token that was written last has not been read.
    every = total + GREEDY["max_new_tokens"] - 1
    held = out.past_key_values.layers[1].keys.shape[2]
    assert held == (every if kept is None else kept + SPARE_TOKENS)


@pytest.mark.parametrize("text", ["moba:4,2,shared=4", "vertical_slash:4,4"])
def test_patterns_that_need_earlier_queries_are_refused_by_name(text: str) -> None:
    pattern = parse_pattern(text)
    model = patch_model(sharing_model(), pattern)
    whole = logits(model)
    with pytest.raises(UserError, match=r"needs all queries.*output_hidden_states=True") as raised:
        model.generate(TOKENS, **GREEDY)
    assert str(pattern) in str(raised.value)
    every = {"output_hidden_states": True, "return_dict_in_generate": True}
    first = model.generate(TOKENS, max_new_tokens=1, do_sample=False, **every).sequences[:, -1]
    assert torch.equal(first, whole[:, -1].argmax(-1))


def test_documents_in_one_row_need_all_queries() -> None:
    model = patch_model(sharing_model(), SWA(4))
    starts = torch.cat([torch.arange(20), torch.arange(30)])[None].expand(2, -1)
    anew: dict[str, Any] = {"position_ids": starts, "use_cache": False}
    whole = logits(model, **anew)
    alone = logits(model, TOKENS[:, 20:])
    torch.testing.assert_close(whole[:, 20:], alone, **TOLERANCE)
    with pytest.raises(UserError, match="several documents needs all queries"):
        logits(model, logits_to_keep=1, **anew)


def test_a_mask_is_taken_apart_in_one_way_alone() -> None:
    mask = SparseMask.causal(1, 5, torch.device("cpu"))
    assert mask[:, :, 0:, :] is mask and mask[:, :, -5:, :] is mask
    last = mask[:, :, 3:, :]
    assert (last.query_offset, last.query_len, last.key_len) == (3, 2, 5)
    assert (last.cached, last.tokens) == (0, 5)
    whole = slice(None)
    for index in (0, (whole, 0), (whole, 0, whole, whole), (whole, whole, slice(1, 3), whole)):
        with pytest.raises(UserError, match="takes its attention mask apart"):
            mask[index]
