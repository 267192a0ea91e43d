"""Law 3: a sequence gives the same result alone, in any batch, padded on either side, or packed.

Seen red when SA permuted the padded length, padding's NaN reached the values, padded outputs were
kept, left padding was not repacked or not put back, and the padding mask was dropped.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch import patch_model
from tests.laws.drawn import METHODS, MODEL_METHODS, narrow_pattern, patterns
from tests.laws.strategies import (
    BACKEND_NAMES,
    MODEL_BACKENDS,
    Case,
    affordable,
    cases,
    make_case,
    serves,
    visible_sets,
)
from tests.small_models import EOS, FAMILIES, PAD, random_tokens, tiny_model

KERNEL_TOLERANCE = 1e-5  # absolute, float32
LOGIT_TOLERANCE = 2e-4  # absolute, float32 logits of size 1 to 10


def row_alone(case: Case, row: int) -> Case:
    """One row of a batch without its padding."""
    length = case.real_tokens()[row]
    q, k, v = (t[row : row + 1, :, :length] for t in (case.q, case.k, case.v))
    return Case(q, k, v, None, case.layer, case.scale)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_a_padded_row_equals_the_row_alone(method: str, backend: str, data: st.DataObject) -> None:
    """Padding is NaN here, and must neither leak into real tokens nor come out of padding."""
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method))
    case = data.draw(cases(ragged=True))
    if not serves(backend, pattern, case):
        return
    together = case.run(pattern, backend)
    for row, length in enumerate(case.real_tokens()):
        alone = row_alone(case, row).run(pattern, backend)
        assert (together[row, :, :length] - alone[0]).abs().max() <= KERNEL_TOLERANCE
        assert torch.equal(together[row, :, length:], torch.zeros_like(together[row, :, length:]))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=6)
@given(data=st.data())
def test_visible_sets_do_not_depend_on_the_batch(
    method: str, backend: str, data: st.DataObject
) -> None:
    if not affordable(backend, data):
        return
    pattern = data.draw(patterns(method))
    lengths = [*data.draw(st.lists(st.integers(1, 20), max_size=2)), 20]
    seed = data.draw(st.integers(0, 1000))
    case = make_case(batch=len(lengths), seq_len=20, lengths=lengths, seed=seed, poison=False)
    if not serves(backend, pattern, case):
        return
    together = visible_sets(pattern, case, backend)
    for row, length in enumerate(lengths):
        alone = visible_sets(pattern, row_alone(case, row), backend)
        assert torch.equal(together[row, :, :length, :length], alone[0])
        assert not together[row, :, :, length:].any()


def pad(rows: list[Tensor], width: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [batch, width]; padding holds id 0, as lm-eval pads."""
    tokens = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[index, place] = row
        mask[index, place] = 1
    return tokens, mask


def logits_of_rows(
    model: PreTrainedModel, rows: list[Tensor], width: int, side: str, mask: bool = True
) -> list[Tensor]:
    """Logits of the real tokens of every row of one padded batch."""
    tokens, attention_mask = pad(rows, width, side)
    logits = model(tokens, attention_mask=attention_mask if mask else None).logits
    if side == "right":
        return [logits[index, : len(row)] for index, row in enumerate(rows)]
    return [logits[index, width - len(row) :] for index, row in enumerate(rows)]


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(data=st.data())
@torch.no_grad()
def test_logits_do_not_depend_on_batch_or_padding(
    family: str, method: str, backend: str, data: st.DataObject
) -> None:
    pattern = data.draw(patterns(method, max_window=10))
    model = patch_model(tiny_model(family), pattern, backend=backend)
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 5))
    rows = [random_tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    alone = [model(row[None]).logits[0] for row in rows]
    for side in ("right", "left"):
        for own, batched in zip(alone, logits_of_rows(model, rows, width, side), strict=True):
            assert (own - batched).abs().max() <= LOGIT_TOLERANCE, side


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("method", MODEL_METHODS)
@torch.no_grad()
def test_an_all_ones_mask_is_no_mask(method: str, backend: str) -> None:
    model = patch_model(tiny_model("qwen3"), narrow_pattern(method), backend=backend)
    tokens = random_tokens(2, 30)
    masked = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert (masked - model(tokens).logits).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("method", ["full", "swa", "moba"])
@torch.no_grad()
def test_right_padding_without_a_mask_is_harmless_to_prefix_stable_patterns(method: str) -> None:
    """What HFLM does: it right-pads with id 0 and passes no mask."""
    model = patch_model(tiny_model("qwen3"), narrow_pattern(method))
    rows = [random_tokens(1, length, length)[0] for length in (7, 20, 31)]
    alone = [model(row[None]).logits[0] for row in rows]
    batched = logits_of_rows(model, rows, 35, "right", mask=False)
    for own, other in zip(alone, batched, strict=True):
        assert (own - other).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
@torch.no_grad()
def test_generation_does_not_depend_on_left_padding(family: str, method: str, decode: str) -> None:
    model = patch_model(tiny_model(family), narrow_pattern(method), decode=decode)
    rows = [random_tokens(1, length, length)[0] for length in (9, 24, 17)]
    tokens, mask = pad(rows, 24, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    together = model.generate(tokens, attention_mask=mask, **options)[:, 24:]
    for row, generated in zip(rows, together, strict=True):
        ones = torch.ones_like(row[None])
        alone = model.generate(row[None], attention_mask=ones, **options)[0, len(row) :]
        assert torch.equal(alone, generated)
    assert EOS not in rows[0]


@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_sequence_gives_the_logits_of_the_sequence_alone(family: str, method: str) -> None:
    model = patch_model(tiny_model(family), narrow_pattern(method))
    tokens = random_tokens(1, 50)
    lengths = [20, 30]
    # Only without a cache does transformers read restarting positions as packing.
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    assert (packed - alone).abs().max() <= LOGIT_TOLERANCE
