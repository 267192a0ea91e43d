"""A gated model under the lm-eval model: its own attention, whole batches, measured FLOPs."""

from pathlib import Path

import pytest

import sa_patch.training  # noqa: F401
from sa_patch import SA, SWA
from sa_patch.errors import UserError
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.training import gated_model
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(save_tiny_checkpoint(tmp_path / "stock"))
    gated_model(stock, 4, seed=2).save_pretrained(tmp_path / "gated")
    tiny_tokenizer().save_pretrained(tmp_path / "gated")
    return tmp_path / "gated"


def test_scores_do_not_depend_on_the_batch_and_both_branches_are_counted(folder: Path) -> None:
    requests = [(None, [5, 6, 7, 8] * 3, [9, 10]), (None, [11, 12, 13], [14, 15, 16])]
    found = []
    for batch_size in (1, 2):
        lm = SAPatchLM(str(folder), batch_size=batch_size, device="cpu", dtype="float32")
        found.append(lm._loglikelihood_tokens(requests, disable_tqdm=True))
        spent = lm.meter.summary()
    for (alone, _), (together, _) in zip(*found, strict=True):
        assert alone == pytest.approx(together, abs=1e-5)
    pairs = sum(
        float(pattern.count_visible(n, layer=layer).sum())
        for pattern in (SA(4, seed=2), SWA(4))
        for n in (13, 5)
        for layer in range(3)
    )
    assert spent["mean_keys_per_query"] == pytest.approx(pairs / 3 / 18)


def test_a_method_of_its_own_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="patterns of its own"):
        SAPatchLM(str(folder), method="swa", window=8, device="cpu")
