"""transformers' text pipeline and streamers, which call `generate` of a patched model."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from sa_patch import SA, SWA, MoBA, patch_model, unpatch_model
from sa_patch.patterns import Pattern, Sinks
from tests.small_models import tiny_model
from tests.tiny_checkpoint import tiny_tokenizer

PROMPTS = [
    "the pass word of the day is",
    "remember one word",
    "filler text follows and nothing in it matters for the answer at the end",
]
CASES: list[tuple[Pattern, str]] = [
    (SA(3), "full"),
    (MoBA(4, 2), "full"),
    (Sinks(1) | SWA(3), "pattern"),
]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.padding_side = "left"
    return made


def model_for(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=len(tokenizer))


def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the model writes after each prompt alone, by `generate` itself."""
    texts = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**given, **GREEDY)[0, given["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("pattern", "decode"), CASES, ids=str)
def test_the_pipeline_writes_what_generate_writes(
    pattern: Pattern, decode: str, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = model_for(tokenizer)
    stock = continuations(model, tokenizer)
    patch_model(model, pattern, decode=decode)
    expected = continuations(model, tokenizer)
    assert expected != stock
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # Rows of three lengths, padded on the left where they share a batch.
    answers = write(PROMPTS, batch_size=batch_size, return_full_text=False, **GREEDY)
    assert [answer[0]["generated_text"] for answer in answers] == expected
    # The pipeline holds the model itself: unpatched, it writes as before.
    unpatch_model(model)
    answers = write(PROMPTS, batch_size=batch_size, return_full_text=False, **GREEDY)
    assert [answer[0]["generated_text"] for answer in answers] == stock


@pytest.mark.parametrize(("pattern", "decode"), CASES, ids=str)
def test_streamed_text_is_the_text(
    pattern: Pattern,
    decode: str,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_for(tokenizer)
    given = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    stock = model.generate(**given, **GREEDY)
    patch_model(model, pattern, decode=decode)
    expected = model.generate(**given, **GREEDY)
    assert not torch.equal(expected, stock)
    text = tokenizer.decode(expected[0, given["input_ids"].shape[1] :], skip_special_tokens=True)

    options = {"skip_prompt": True, "skip_special_tokens": True}
    printed = model.generate(**given, streamer=TextStreamer(tokenizer, **options), **GREEDY)
    assert torch.equal(printed, expected)
    assert capsys.readouterr().out == text + "\n"

    streamer = TextIteratorStreamer(tokenizer, timeout=60, **options)
    writer = Thread(target=model.generate, kwargs={**given, "streamer": streamer, **GREEDY})
    writer.start()
    pieces = list(streamer)
    writer.join()
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert torch.equal(unpatch_model(model).generate(**given, **GREEDY), stock)
