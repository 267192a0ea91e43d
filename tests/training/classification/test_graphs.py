"""Attention graphs of classifiers, and what ablation takes away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis.graphs.classifier_graph import DRAWN, LENGTHS, TEXTS, measure_classifier
from sa_patch.analysis.graphs.weight_graph import WeightGraph
from sa_patch.training import FractionalAttention
from sa_patch.training.classification.comparison import entry, write_comparison
from sa_patch.training.classification.data import Numbered, Texts, learn_words
from sa_patch.training.classification.figures import draw_graphs
from sa_patch.training.classification.model import TextClassifier
from sa_patch.training.classification.settings import Classifier
from sa_patch.training.classification.training import ABLATED, thinned
from tests.pictures import DRAWN as DRAWN_PIXELS
from tests.pictures import coloured

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts() -> Numbered:
    """40 texts of 70 words, and one too short for most lengths."""
    generator = np.random.default_rng(0)
    lines = [" ".join(f"w{n}" for n in generator.integers(0, 50, 70)) for _ in range(40)]
    lines.append("w1 w2 w3")
    return Numbered(Texts(tuple(lines), (0, 1) * 20 + (0,)), learn_words(lines, 100), 256)


def classifier(alpha: float | None, **settings: Any) -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier(Classifier(alpha=alpha, head_dim=8, **settings), 100, 2).eval()


@pytest.mark.parametrize("alpha", [None, 1.2, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_what_attention_mixes_values_with(alpha: float | None, shared: bool) -> None:
    torch.manual_seed(0)
    layer = FractionalAttention(12, 2, 6, alpha, shared=shared)
    hidden = torch.randn(3, 7, 12)
    real = torch.arange(7) < torch.tensor([[7], [5], [2]])
    with torch.no_grad():
        weights = layer.weights(hidden, real)
        values = layer.v_proj(hidden).unflatten(-1, (2, 6)).transpose(1, 2)
        expected = layer.o_proj((weights @ values).transpose(1, 2).flatten(2))
        assert torch.allclose(layer(hidden, real), expected, atol=1e-6)
    assert torch.allclose(weights.sum(-1)[0], torch.ones(2, 7))
    assert not weights[1, :, :, 5:].any() and not weights[1, :, 5:].any()
    if shared:
        assert not weights.diagonal(dim1=-2, dim2=-1).any()


def test_measures_are_taken_over_texts_heads_and_layers(texts: Numbered) -> None:
    model = classifier(1.2, layers=2, heads=2)
    with torch.no_grad():
        found = measure_classifier(model, texts, CPU)
        assert [row["n"] for row in found["lengths"]] == [n for n in LENGTHS if n <= 70]
        assert {row["texts"] for row in found["lengths"]} == {TEXTS}
        words = torch.tensor([line[:16] for line in texts.words[:TEXTS]])
        weights = model.attention_weights(words, torch.ones_like(words, dtype=torch.bool))
    assert weights.shape == (2, TEXTS, 2, 16, 16)
    graphs = [WeightGraph.of(one.numpy()) for one in weights.flatten(0, 2)]
    gaps = [graph.spectral_gap() for graph in graphs]
    assert found["lengths"][0]["gap"] == pytest.approx(np.mean(gaps), rel=1e-4)
    paths = [graph.mean_path() for graph in graphs]
    assert found["lengths"][0]["median_path"] == pytest.approx(np.median(paths), rel=1e-4)
    assert found["drawn"]["words"][:3] == texts.spelt(texts.words[0][:3])
    assert np.array(found["drawn"]["places"]).shape == (DRAWN, 2)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    share=st.sampled_from([*ABLATED, 0.99]),
    seed=st.integers(0, 99),
)
def test_ablation_hides_that_share_and_never_all(
    lengths: list[int], share: float, seed: int
) -> None:
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    kept = thinned(real, share, torch.Generator().manual_seed(seed))
    assert not (kept & ~real).any()
    for n, row in zip(lengths, kept, strict=True):
        assert int(row.sum()) == max(1, n - int(np.float32(share) * np.float32(n)))


def test_ablation_is_random_over_places() -> None:
    real = torch.ones(2000, 10, dtype=torch.bool)
    kept = thinned(real, 0.3, torch.Generator().manual_seed(0))
    assert kept.float().mean(0).numpy() == pytest.approx(np.full(10, 0.7), abs=0.05)


def row(
    alpha: float | None, *measured: dict[str, Any], source: str = "some/texts"
) -> dict[str, Any]:
    """A row of the table, of trials with these measures and accuracies of 0.5, 0.6, ..."""
    results = [
        {
            "accuracy": 0.5 + 0.1 * trial,
            "ablated": {f"{share:g}": 0.5 for share in ABLATED},
            "measured": one,
            "parameters": 1,
            "train_texts": 1,
            "measured_texts": 41,
            "seconds": 1.0,
        }
        for trial, one in enumerate(measured)
    ]
    chosen = {"learning_rate": 0.01, "epochs": 1, "held_out_accuracy": 0.5}
    return entry(source, Classifier(alpha=alpha, head_dim=8), chosen, results)


@torch.no_grad()
def test_the_table_holds_graphs_and_their_figures(texts: Numbered, tmp_path: Path) -> None:
    rows = []
    for alpha in (None, 1.2):
        measured = measure_classifier(classifier(alpha), texts, CPU)
        rows.append(row(alpha, measured, measured))
    assert rows[0]["accuracy"]["mean"] == pytest.approx(0.55)
    first = rows[1]["graph"]["lengths"][0]
    assert first["gap"]["deviation"] == 0 and first["gap"]["values"][0] == first["gap"]["mean"]
    files = write_comparison(tmp_path, rows, ["A note."], {"versions": {}})
    names = {file.name for file in files}
    for stem in ("classification", "graphs", "diffusion"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names


@torch.no_grad()
def test_a_trial_whose_graph_falls_apart_leaves_the_figure_readable(texts: Numbered) -> None:
    measured = measure_classifier(classifier(1.2), texts, CPU)
    broken = {**measured, "lengths": [one | {"median_path": 1e9} for one in measured["lengths"]]}
    found = row(1.2, measured, broken, measured)
    middle = found["graph"]["lengths"][0]["median_path"]["median"]
    assert middle == measured["lengths"][0]["median_path"]
    low, high = draw_graphs({"entries": [found]})["graphs"].axes[1].get_ylim()
    assert low < middle < high < 1e4


@torch.no_grad()
def test_a_data_set_of_few_or_short_texts_has_empty_panels(texts: Numbered, tmp_path: Path) -> None:
    measured = measure_classifier(classifier(1.2), texts, CPU)
    short: dict[str, Any] = {"lengths": [], "drawn": None}
    rows = [row(1.2, measured), row(1.2, short, source="some/few")]
    figure = draw_graphs({"entries": rows})["graphs"]
    told = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert told == [[]] * 3 + [["fewer than 32 test texts\nof 16 words"]] * 2 + [[]]
    write_comparison(tmp_path, rows, ["A note."], {"versions": {}})
    assert coloured(tmp_path / "graphs.png") > DRAWN_PIXELS


@torch.no_grad()
def test_trials_whose_words_nothing_joins_are_left_out_of_paths(
    texts: Numbered, tmp_path: Path
) -> None:
    measured = measure_classifier(classifier(1.2), texts, CPU)
    alone = {**measured, "lengths": [one | {"median_path": None} for one in measured["lengths"]]}
    rows = [row(1.2, measured, alone), row(None, alone), row(1.6, alone, source="some/others")]
    first = rows[0]["graph"]["lengths"][0]
    assert first["median_path"]["values"] == [measured["lengths"][0]["median_path"]]
    assert [one["graph"]["lengths"][0]["without_path"] for one in rows] == [1, 1, 1]
    figure = draw_graphs({"entries": rows})["graphs"]
    assert [len(axes.texts) for axes in figure.axes] == [0, 0, 0, 0, 1, 0]
    notes = " ".join(" ".join(text.get_text().split()) for text in figure.texts)
    assert "whose weights join no two words are left out of paths." in notes
    write_comparison(tmp_path, rows, ["A note."], {"versions": {}})
