"""Several documents in one row of a patched model: each is as if alone, and trains as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening

from sa_patch import SA, SWA, Full, patch_model
from sa_patch.errors import UserError
from sa_patch.patching.patch import observe_layers
from tests.small_models import PAD, random_tokens, tiny_model

TOLERANCE = 1e-4  # absolute, float32 logits of size 1 to 10
ROWS = [[20, 33, 7], [1, 30, 29]]
TOKENS = random_tokens(2, 60)
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])
ENDS = torch.tensor([0, 20, 53, 60])
PATTERNS = [
    "swa:5",
    "sa:6",
    "moba:4,2",
    "tail:3+sinks:2+sa:4",
    "block_topk:2,2,2,shared=4,segment=8",
]


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor, **arguments: Any) -> Tensor:
    result: Tensor = model(tokens, **arguments).logits
    return result


def each_alone(model: nn.Module, tokens: Tensor, rows: list[list[int]]) -> Tensor:
    alone = [
        [logits(model, document[None])[0] for document in row.split(lengths)]
        for row, lengths in zip(tokens, rows, strict=True)
    ]
    return torch.stack([torch.cat(parts) for parts in alone])


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_documents_in_a_row_are_as_if_alone(
    family: str, text: str, layers: list[int] | None
) -> None:
    own = {"sliding_window": 64} if family == "mistral" else {}
    model = patch_model(tiny_model(family, **own), text, layers=layers, decode="pattern")
    expected = each_alone(model, TOKENS, ROWS)
    told = logits(model, TOKENS, position_ids=POSITIONS, use_cache=False)
    assert (told - expected).abs().max() <= TOLERANCE
    whole = logits(model, TOKENS, use_cache=False)
    assert (whole - expected).abs().max() > 100 * TOLERANCE
    # Positions go on from document to document here; rotary embeddings do not mind.
    ends = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}
    for arguments in (ends, ends | {"position_ids": POSITIONS[:1], "use_cache": False}):
        padding_free = logits(model, TOKENS[:1], **arguments)
        assert (padding_free - expected[:1]).abs().max() <= TOLERANCE


def test_a_padding_free_batch_of_transformers_is_taken_as_it_is() -> None:
    model = patch_model(tiny_model("qwen3"), SA(4))
    documents = [{"input_ids": row.tolist()} for row in TOKENS[0].split(ROWS[0])]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    batch.pop("labels")
    out = logits(model, batch.pop("input_ids"), **batch)
    assert (out - each_alone(model, TOKENS[:1], ROWS[:1])).abs().max() <= TOLERANCE


def test_observers_see_documents_one_by_one() -> None:
    model, seen = patch_model(tiny_model("llama"), Full()), []
    observe_layers(model, lambda layer, q, k, spans: seen.append((k.shape[2], spans)), [0])
    logits(model, TOKENS, position_ids=POSITIONS, use_cache=False)
    assert [(n, spans.lengths) for n, spans in seen] == [(n, (n,)) for row in ROWS for n in row]


UNEVEN: dict[str, tuple[dict[str, Any], str]] = {
    "too short": ({"cu_seq_lens_q": ENDS[:3]}, "go up from 0 to 60"),
    "keys": ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS[[0, 1, 3]]}, "must be the same"),
    "positions": (
        {"cu_seq_lens_q": ENDS[[0, 1, 3]], "position_ids": POSITIONS[:1], "use_cache": False},
        "tell documents apart differently",
    ),
    "padding": (
        {"cu_seq_lens_q": ENDS, "attention_mask": (torch.arange(60) > 4)[None].long()},
        "does not go with padding",
    ),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_lengths_that_do_not_fit_are_refused(case: str) -> None:
    arguments, says = UNEVEN[case]
    model = patch_model(tiny_model("llama"), SWA(4))
    with pytest.raises(UserError, match=says):
        logits(model, TOKENS[:1], **arguments)


class Waits(TorchDispatchMode):
    """What would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.name() for name in ("_local_scalar_dense", "nonzero"))
        return func(*args, **(kwargs or {}))


def test_rows_of_one_document_are_told_without_waiting() -> None:
    counts = []
    for patch in (False, True):
        model = tiny_model("llama")
        if patch:
            # Torch's own attention: what waits here would wait under every pattern.
            patch_model(model, Full())
        with torch.no_grad(), Waits() as seen:
            model(TOKENS, position_ids=torch.arange(60)[None], use_cache=False)
        counts.append(seen.count)
    stock, patched = counts
    # transformers itself asks whether positions start anew.
    assert patched == stock >= 1


STEPS = 20


def trained(packed: bool, text: str) -> tuple[list[float], list[Tensor]]:
    """Losses of LoRA steps, and the gradients of the last, on documents in a row or in rows."""
    model = patch_model(tiny_model("llama"), text, backend="banded")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses: list[float] = []
    for step in range(STEPS):
        row = random_tokens(1, 60, seed=step)[0]
        documents = list(row.split(ROWS[0]))
        if packed:
            starts = POSITIONS[0] == 0
            batch = {
                "input_ids": row[None],
                "labels": row.masked_fill(starts, -100)[None],
                "position_ids": POSITIONS[:1],
            }
        else:
            pad = nn.utils.rnn.pad_sequence
            real = pad([torch.ones_like(each) for each in documents], batch_first=True)
            batch = {
                "input_ids": pad(documents, batch_first=True, padding_value=PAD),
                "labels": pad(documents, batch_first=True, padding_value=-100),
                "attention_mask": real,
            }
        optimizer.zero_grad()
        loss = adapted(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return losses, gradients


@pytest.mark.parametrize("text", ["sinks:2+swa:4+psa:4", "sa:6"])
def test_lora_on_packed_rows_trains_as_on_separate_rows(text: str) -> None:
    losses, gradients = trained(True, text)
    expected_losses, expected_gradients = trained(False, text)
    assert losses[-1] != losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
