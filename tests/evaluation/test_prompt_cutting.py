"""Prompts that are too long lose their beginning, as in lm-eval, or their middle."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.evaluation.prompt_cutting import cut


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> Any:
    return SAPatchLM(pretrained=str(checkpoint), method="full", batch_size=2, device="cpu")


def test_what_is_kept() -> None:
    tokens = list(range(10))
    assert cut(tokens, 4, "left") == [6, 7, 8, 9]
    assert cut(tokens, 4, "middle") == [0, 1, 8, 9]
    assert cut(tokens, 5, "middle") == [0, 1, 7, 8, 9]
    assert cut(tokens, 10, "middle") == cut(tokens, 11, "left") == tokens
    assert cut(tokens, 1, "middle") == [9]


def test_prompts_of_generation(lm: Any) -> None:
    prompts = ["one two three four five six seven eight", "nine"]
    plain = [lm.tok_encode(prompt) for prompt in prompts]
    lm.cut_prompts("middle", 6)
    tokens, mask = lm.tok_batch_encode(prompts, left_truncate_len=100)
    kept = [row[own.bool()].tolist() for row, own in zip(tokens, mask, strict=True)]
    assert kept == [plain[0][:3] + plain[0][-3:], plain[1][-6:] if len(plain[1]) > 6 else plain[1]]
    assert mask[:, -1].all()
    lm.cut_prompts("middle", None)
    tokens, _ = lm.tok_batch_encode(prompts[:1], left_truncate_len=8)
    assert tokens.tolist() == [plain[0][:4] + plain[0][-4:]]
    lm.cut_prompts()
    tokens, _ = lm.tok_batch_encode(prompts[:1], left_truncate_len=8)
    assert tokens.tolist() == [plain[0][-8:]]


def test_prompts_of_choices_keep_their_continuation(lm: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(5, 300, (50,), generator=generator).tolist()
    lm.cut_prompts("middle", 20)
    try:
        found = lm._loglikelihood_tokens([(("a", "b"), context, [7, 8])])
    finally:
        lm.cut_prompts()
    expected = lm._loglikelihood_tokens([(("a", "b"), context[:10] + context[-10:], [7, 8])])
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-5)
    uncut = lm._loglikelihood_tokens([(("a", "b"), context, [7, 8])])
    assert abs(uncut[0][0] - found[0][0]) > 1e-4


def test_another_word_is_refused(lm: Any) -> None:
    with pytest.raises(UserError, match="unknown truncation 'right'"):
        lm.cut_prompts("right")
