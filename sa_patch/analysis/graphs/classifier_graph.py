"""Attention graphs of small text classifiers: gaps, paths against length, and a diffusion map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sa_patch.analysis.graphs.weight_graph import WeightGraph

# Words from a text's start at which its graph is measured.
LENGTHS = (16, 32, 64, 128, 256)
# Texts of each length, the first ones that are long enough.
TEXTS = 32
# Words of the text that is drawn.
DRAWN = 64


class Classifier(Protocol):
    """What `sa_patch.training.TextClassifier` has."""

    def attention_weights(self, words: Tensor, real: Tensor) -> Tensor: ...


class Texts(Protocol):
    """Texts as numbers of words."""

    @property
    def words(self) -> Sequence[Sequence[int]]: ...

    def spelt(self, numbers: Sequence[int]) -> list[str]: ...


def measure_classifier(model: Classifier, texts: Texts, device: torch.device) -> dict[str, Any]:
    """Graphs of the attention that a classifier pays within texts.

    Every text is cut to each of `LENGTHS` in turn, so that graphs of different lengths are those
    of the same beginnings. The same texts are taken for every classifier.

    Returns:
        "lengths": for each with enough texts "n", "texts", "gap" and "median_path": mean of the
        spectral gaps, and median of the mean shortest paths (which a single token that nothing
        ties to the rest makes as long as it likes), over texts, heads and layers. "drawn": of the
        first text of at least `DRAWN` words its "words", and "places" ``[n, 2]`` and "gap" of the
        first layer's first head; None if there is none.
    """
    rows = []
    for n in LENGTHS:
        chosen = [words[:n] for words in texts.words if len(words) >= n][:TEXTS]
        if len(chosen) < TEXTS:
            break
        graphs = [graph for words in chosen for graph in _graphs(model, words, device)]
        gaps = [graph.spectral_gap() for graph in graphs]
        paths = [graph.mean_path() for graph in graphs]
        rows.append(
            {
                "n": n,
                "texts": len(chosen),
                "gap": float(np.mean(gaps)),
                "median_path": float(np.median(paths)),
            }
        )
    return {"lengths": rows, "drawn": _drawn(model, texts, device)}


def _graphs(model: Classifier, words: Sequence[int], device: torch.device) -> list[WeightGraph]:
    """Of every head of every layer for one text."""
    numbers = torch.tensor([list(words)], device=device)
    weights = model.attention_weights(numbers, torch.ones_like(numbers, dtype=torch.bool))
    return [WeightGraph.of(head) for head in weights[:, 0].flatten(0, 1).double().cpu().numpy()]


def _drawn(model: Classifier, texts: Texts, device: torch.device) -> dict[str, Any] | None:
    words = next((words[:DRAWN] for words in texts.words if len(words) >= DRAWN), None)
    if words is None:
        return None
    graph = _graphs(model, words, device)[0]
    return {
        "words": texts.spelt(words),
        "places": graph.diffusion_map().round(6).tolist(),
        "gap": graph.spectral_gap(),
    }
