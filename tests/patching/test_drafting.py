"""Assisted decoding on patched models: what is drafted never changes what is written."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from sa_patch import SA, SWA, Full, MoBA, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patterns import PSA, Pattern, Sinks, Tail
from tests.small_models import PAD, random_tokens, tiny_model

STABLE: list[Pattern] = [Sinks(2) | SWA(4), MoBA(4, 2), PSA(4)]
UNSTABLE: list[Pattern] = [SA(3), Tail(4) | SWA(3)]
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "max_new_tokens": 24,
    "output_logits": True,
    "return_dict_in_generate": True,
}
# A prompt that repeats itself, so that prompt lookup has something to draft in the first round.
PROMPT = random_tokens(1, 11).repeat(1, 3)
LOOKUP = {"prompt_lookup_num_tokens": 6}


def write(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens and the logits of a greedy generation."""
    out = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **options)
    return out.sequences, torch.cat(out.logits)


def near_copy(model: PreTrainedModel) -> PreTrainedModel:
    """An assistant that is often right, and sometimes not."""
    other = unpatch_model(copy.deepcopy(model))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for weight in other.parameters():
            weight += 0.01 * torch.randn_like(weight)
    return other


def agree(ours: tuple[Tensor, Tensor], greedy: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], greedy[0])
    torch.testing.assert_close(ours[1], greedy[1], atol=2e-4, rtol=1e-4)


def forward_lengths(model: PreTrainedModel, **options: Any) -> list[int]:
    """How many tokens each forward pass of a generation reads."""
    lengths: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape[1])
    )
    write(model, **options)
    handle.remove()
    return lengths


@pytest.mark.parametrize("pattern", STABLE + UNSTABLE, ids=str)
def test_with_full_decoding_any_draft_gives_greedy_output(pattern: Pattern) -> None:
    model = patch_model(tiny_model("llama"), pattern)
    greedy = write(model)
    agree(write(model, **LOOKUP), greedy)
    assistant = near_copy(model)
    agree(write(model, assistant_model=assistant), greedy)
    agree(write(model, assistant_model=patch_model(assistant, SA(2))), greedy)


@pytest.mark.parametrize("pattern", STABLE, ids=str)
def test_prefix_stable_patterns_may_go_on_while_drafting(pattern: Pattern) -> None:
    model = patch_model(tiny_model("llama"), pattern, decode="pattern")
    greedy = write(model)
    agree(write(model, **LOOKUP), greedy)
    assistant = near_copy(model)
    agree(write(model, assistant_model=assistant), greedy)
    # An assistant may itself go on with any pattern: it only drafts.
    for other in (pattern, SA(3)):
        patch_model(assistant, other, decode="pattern")
        agree(write(model, assistant_model=assistant), greedy)


@pytest.mark.parametrize("pattern", UNSTABLE, ids=str)
def test_patterns_that_drafts_would_change_are_refused(pattern: Pattern) -> None:
    model = patch_model(tiny_model("llama"), pattern, decode="pattern")
    for options in (LOOKUP, {"assistant_model": tiny_model("llama")}):
        with pytest.raises(UserError, match="assisted decoding with decode='pattern' does not go"):
            write(model, **options)
    write(model)
    # A model of which only some layers would change is refused as well.
    patch_model(model, layers={0: SWA(3), 1: pattern}, decode="pattern")
    with pytest.raises(UserError, match="every drafted token changes"):
        write(model, **LOOKUP)
    agree(write(patch_model(model, Full(), decode="pattern"), **LOOKUP), write(model))


def test_drafts_are_taken_after_the_prompt_was_read_alone() -> None:
    model = patch_model(tiny_model("llama"), SA(3))
    assistant = copy.deepcopy(model)
    assistant.generation_config.assistant_confidence_threshold = 0  # it drafts 20 tokens each time
    lengths = forward_lengths(model, assistant_model=assistant)
    assert lengths[0] == PROMPT.shape[1]
    assert max(lengths[1:]) > 10, "later rounds draft"
    assert len(lengths) < 6, "and most of it is taken"


def test_unpatched_models_draft_as_before() -> None:
    model = tiny_model("llama")
    stock, lengths = write(model, **LOOKUP), forward_lengths(model, **LOOKUP)
    assert lengths[0] > PROMPT.shape[1], "stock drafts behind the prompt at once"
    with patched(model, SA(3)):
        assert forward_lengths(model, **LOOKUP)[0] == PROMPT.shape[1]
    for each in (model, unpatch_model(copy.deepcopy(patch_model(model, SA(3))))):
        again = write(unpatch_model(each), **LOOKUP)
        assert torch.equal(again[0], stock[0]) and torch.equal(again[1], stock[1])
        assert forward_lengths(each, **LOOKUP) == lengths


def test_a_copy_drafts_for_itself() -> None:
    model = patch_model(tiny_model("llama"), SA(3), decode="pattern")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    unpatch_model(model)
    for other in copies:
        with pytest.raises(UserError, match="every drafted token changes"):
            write(other, **LOOKUP)
        patch_model(other, SA(3))
        agree(write(other, **LOOKUP), write(other))
    assert forward_lengths(model, **LOOKUP)[0] > PROMPT.shape[1]


def test_drafted_text_streams() -> None:
    """The streamer is given each token once, several at a time."""
    seen: list[int] = []

    class Recorder(TextStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    model = patch_model(tiny_model("llama"), SA(3))
    sequences, _ = write(model, streamer=Recorder(), **LOOKUP)
    assert seen == sequences[0].tolist()
