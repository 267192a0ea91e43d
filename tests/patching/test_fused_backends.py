"""Backends whose kernels are compiled or interpreted here, in whole models.

The laws of models run on the backends in pure torch; of these it is shown that a patched model
reaches them, padded and cached, and that they do what `banded` does. What flex compiles is walked.
"""

import pytest
import torch

from sa_patch import patch_model
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, MoBA, Pattern
from tests.block_walk import walked_lists
from tests.small_models import random_tokens, tiny_model

__all__ = ["walked_lists"]

pytestmark = pytest.mark.usefixtures("walked_lists")

LOGIT_TOLERANCE = 2e-4  # absolute, float32 logits of size 1 to 10
PATTERNS = [SWA(4), SA(3), MoBA(3, 2)]


@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@torch.no_grad()
def test_a_padded_prefill_and_a_cached_token_equal_banded(
    family: str, pattern: Pattern, backend: str
) -> None:
    model = tiny_model(family)
    tokens = random_tokens(2, 21)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    logits = []
    for name in ("banded", backend):
        patch_model(model, pattern, backend=name)
        prefill = model(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True)
        cache = prefill.past_key_values
        step = model(tokens[:, 20:], attention_mask=mask, past_key_values=cache)
        logits.append(torch.cat([prefill.logits, step.logits], dim=1))
    difference = (logits[0] - logits[1]).abs()
    assert difference[0].max() <= LOGIT_TOLERANCE
    assert difference[1, 6:].max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("backend", ["triton", "flex"])
@torch.no_grad()
def test_logits_before_a_changed_token_are_bit_identical(backend: str) -> None:
    for pattern in PATTERNS:
        model = patch_model(tiny_model("qwen3"), pattern, backend=backend)
        tokens = random_tokens(2, 33)
        other = tokens.clone()
        other[:, 20] = 3 + (other[:, 20] + 1) % 50
        before, after = model(tokens).logits, model(other).logits
        assert torch.equal(before[:, :20], after[:, :20]), pattern
        assert not torch.equal(before[:, 20:], after[:, 20:])


def test_gradients_are_refused_before_anything_runs() -> None:
    tokens = random_tokens(1, 12)
    for backend in ("triton", "flex"):
        model = patch_model(tiny_model("qwen3"), SWA(4), backend=backend)
        with pytest.raises(UserError, match=f"backend {backend!r} cannot serve"):
            model(tokens)


def test_flash_says_that_it_needs_a_gpu() -> None:
    model = patch_model(tiny_model("qwen3"), SWA(4), backend="flash")
    with pytest.raises(UserError, match="CUDA"), torch.no_grad():
        model(random_tokens(1, 12))
