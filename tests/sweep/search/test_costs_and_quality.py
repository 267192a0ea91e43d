"""What candidates of a search spend, and how their answers are scored."""

from __future__ import annotations

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.metering.pattern_meter import HeadShape, PatternMeter
from sa_patch.evaluation.recovery import recovered
from sa_patch.patching import observe_layers, patched
from sa_patch.patterns import SWA, FlashPrefill, parse_pattern
from sa_patch.sweep.search import quality
from sa_patch.sweep.search.costs import Costs
from sa_patch.sweep.search.quality import Quality
from tests.small_models import random_tokens, tiny_model

N = 384
TOKENS = tuple(random_tokens(1, N, seed=1)[0].tolist())
TEXT = Document("source", TOKENS, tuple(range(360, N)))
FAMILY = "flashprefill:{},16,sinks=0,local=1,last=0"


@pytest.mark.parametrize("cost", ["flops", "visited"])
def test_a_threshold_spends_most_of_the_budget_and_no_more(cost: str) -> None:
    model = tiny_model("llama")
    costs = Costs(model, TEXT, range(model.config.num_hidden_layers))
    spent = {"flops": costs.flops, "visited": costs.visited}[cost]
    for share in (0.6, 0.8):
        pattern = costs.fit(FAMILY, share, cost)
        everywhere = dict.fromkeys(range(model.config.num_hidden_layers), pattern)
        assert share - 0.03 < spent(everywhere) <= share
        assert isinstance(pattern, FlashPrefill) and 0 < pattern.alpha < 1
    with pytest.raises(UserError, match="take a larger share"):
        costs.fit(FAMILY, 0.01, cost)


@pytest.mark.parametrize(
    "text",
    [
        FAMILY.replace("{}", "0.9"),
        "sinks:4+" + FAMILY.replace("{}", "0.9"),
        "block_topk:16,2,16,branch=0,shared=32,segment=32",
        "sinks:4+moba:16,3,shared=32,grouped=true",
    ],
)
def test_flops_are_those_of_a_run(text: str) -> None:
    model, pattern = tiny_model("llama"), parse_pattern(text)
    # The first layer reads what it does under full attention, whatever the pattern.
    with patched(model, layers={0: pattern}):
        meter = PatternMeter({0: pattern}, HeadShape.of(model.config))
        observe_layers(model, meter.observe, [0])
        model(torch.tensor([TOKENS]))
    meter.add([N])
    run = meter.summary()
    assert Costs(model, TEXT, [0]).flops({0: pattern}) == pytest.approx(
        run["attention_flops"] / run["full_attention_flops"]
    )


def test_answers_are_scored_among_all_pass_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "LEAST_ABOVE_CHANCE", 1e-4)
    model = tiny_model("llama")
    choices, asked = (3, 5, 7, 11), (40, 60)
    tokens = list(TOKENS)

    def among(place: int) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, place - 1]
        return logits[list(choices)].softmax(-1)

    def by_hand() -> float:
        return sum(float(among(at)[choices.index(tokens[at])]) for at in asked) / 2

    for at in asked:  # What full attention thinks right is right.
        tokens[at] = choices[int(among(at).argmax())]
    document = Document("recall", tuple(tokens), (40, 41, 60), asked, choices)
    scored, full = Quality(model), by_hand()
    assert scored.scores(None, [document]) == pytest.approx([full], rel=1e-5)
    window = dict.fromkeys(range(model.config.num_hidden_layers), SWA(2))
    with patched(model, layers=window):
        ours = by_hand()
    assert scored.scores(window, [document]) == pytest.approx([ours], rel=1e-5)
    # A guess among four is right once in four.
    kept = recovered(ours, full, False, 1 / 4)
    assert abs(kept - 1) > 0.01
    assert scored.recovery(window, [document]) == pytest.approx(kept, rel=1e-4)
    assert scored.kept(window, [document]).mean.value == pytest.approx(kept, rel=1e-4)
