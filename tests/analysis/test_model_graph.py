"""Graphs of a model's own attention, against transformers' eager weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from sa_patch.analysis.graphs.weight_graph import WeightGraph
from sa_patch.analysis.model_graph import measure_head_graphs
from sa_patch.analysis.reports.model_graph import model_graph_report
from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern
from tests.small_models import tiny_model
from tests.tiny_checkpoint import save_tiny_checkpoint

TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3")


def test_full_attentions_graphs_are_those_of_eager_weights(model: PreTrainedModel) -> None:
    found = measure_head_graphs(model, TOKENS, Full(), [0, 1], sources=99)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        told = model(TOKENS, output_attentions=True, labels=TOKENS)
    model.set_attn_implementation("sdpa")
    for place, layer in enumerate(told.attentions):
        graphs = [WeightGraph.of(head.numpy()) for head in layer[0]]
        assert found.gap[place] == pytest.approx([one.spectral_gap() for one in graphs], rel=1e-4)
        assert found.path[place] == pytest.approx([one.mean_path() for one in graphs], rel=1e-4)
    assert found.loss == pytest.approx(float(told.loss), rel=1e-5)


@pytest.mark.parametrize("pattern", [SWA(3), SA(3), MoBA(4, 2), SWA(2) | SA(2)], ids=str)
def test_a_pattern_changes_graphs_and_loss_and_nothing_that_stays(
    model: PreTrainedModel, pattern: Pattern
) -> None:
    with torch.no_grad():
        before = model(TOKENS).logits
    full = measure_head_graphs(model, TOKENS, Full(), [1])
    sparse = measure_head_graphs(model, TOKENS, pattern, [1])
    assert sparse.gap.shape == full.gap.shape == sparse.path.shape
    assert (sparse.gap != full.gap).all() and sparse.loss != full.loss
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_a_window_that_holds_everything_is_full_attention(model: PreTrainedModel) -> None:
    full = measure_head_graphs(model, TOKENS, Full(), [0, 1])
    wide = measure_head_graphs(model, TOKENS, SWA(99), [0, 1])
    assert wide.gap == pytest.approx(full.gap, rel=1e-4)
    assert wide.loss == pytest.approx(full.loss, rel=1e-5)


def test_the_report_ranks_gaps_against_losses(model: PreTrainedModel) -> None:
    patterns = [Full(), SWA(2), SWA(4), SA(3)]
    found = [measure_head_graphs(model, TOKENS, pattern, [0, 1]) for pattern in patterns]
    assert measure_head_graphs(model, TOKENS, Full()).layers.tolist() == [0, 1]
    report = model_graph_report(found, {"model": "tiny", "n": 20})
    rows = report.content["patterns"]
    assert [row["pattern"] for row in rows] == [str(pattern) for pattern in patterns]
    assert rows[1]["gap"] == pytest.approx(found[1].gap.mean(), rel=1e-5)
    assert np.array(rows[1]["gap_by_head"]).shape == found[1].gap.shape
    order = [np.argsort(np.argsort([row[key] for row in rows])) for key in ("gap", "loss")]
    expected = float(stats.pearsonr(*order).statistic)
    told = report.content["rank_correlation_with_loss"]["gap"]
    assert told == pytest.approx(expected, rel=1e-4)
    assert f"gap {expected:.2f}" in report.note


@pytest.mark.parametrize(
    ("layers", "sources", "says"),
    [([], 4, "no layers"), ([0, 7], 4, r"no layers \[7\].*0-1"), ([0], 0, "sources must be")],
)
def test_what_cannot_be_measured_is_refused(
    model: PreTrainedModel, layers: list[int], sources: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        measure_head_graphs(model, TOKENS, Full(), layers, sources=sources)


def test_the_command_writes_numbers_and_a_figure(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    words = ["analyze", "model-graph", str(checkpoint), "--n", "24", "--layers", "0,1"]
    assert main([*words, "--methods", "full,swa:4,sa:4", "--out", str(out)]) == 0
    assert "Rank correlation" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in out.iterdir()} == {
        f"model_graph.{kind}" for kind in ("json", "png", "svg")
    }
    for wrong, says in (
        (["--layers", "30"], "no layers [30]"),
        (["--n", "9K"], "more than the 2,048"),
    ):
        assert main([*words, *wrong, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    # A configuration without a number of layers: the model itself says which it has.
    monkeypatch.setattr("sa_patch.models.layer_check.layer_count", lambda source: None)
    assert main([*words, "--layers", "30", "--out", str(out)]) == 2
    assert "no layers [30] to measure; the model has 0-2" in capsys.readouterr().err
