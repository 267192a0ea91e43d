"""What a classifier and its training are: plain values, which name the files of its trials."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.training.fractional.distance_kernel import DistanceKernel

DOT = "dot"
# Of a trial's file; files of another are made again.
FORMAT = 2


@dataclass(frozen=True)
class Classifier:
    """Sizes and attention of a text classifier, and how it is trained but for rate and epochs.

    Args:
        alpha: of fractional attention, 1 to 2; None for dot-product attention.
        layers, heads, head_dim: its size; the width is ``heads * head_dim``.
        geometry, bandwidth, density, shared, orthonormal: see `FractionalAttention`.
        max_length: words that are read of a text, from its start.
        vocabulary: words at most, the most frequent of the training texts.
        batch: texts of a step of AdamW.
        dropout: of embeddings and of what a layer adds.

    Raises:
        UserError: for a value that is not allowed.
    """

    alpha: float | None
    head_dim: int
    layers: int = 1
    heads: int = 1
    geometry: str = "euclidean"
    bandwidth: float | str = 1.0
    density: float = 0.0
    shared: bool = False
    orthonormal: bool = False
    max_length: int = 256
    vocabulary: int = 20_000
    batch: int = 32
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for key in ("head_dim", "layers", "heads", "max_length", "batch"):
            whole_number(getattr(self, key), key, 1)
        whole_number(self.vocabulary, "vocabulary", 3)
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be from 0 to below 1, got {self.dropout}")
        kernel = DistanceKernel(self.alpha or 2, self.geometry, self.bandwidth, self.density)
        kernel.check_head_dim(self.head_dim)

    @property
    def attention(self) -> str:
        """ "dot", or "fna" with its alpha."""
        return DOT if self.alpha is None else f"fna {self.alpha:g}"


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        source, fingerprint: of the data set.
        seed: of the weights, the order of the texts and, where a part is held out, of that.
        learning_rate: of AdamW, after a linear rise over the first `WARMUP` steps.
        epochs: passes over the training texts.
        held_out: share of the training texts that is not trained on but measured after every
            epoch, the test texts being left alone; 0 to train on all and measure the test texts
            once, at the end.
    """

    source: str
    fingerprint: str
    classifier: Classifier
    seed: int
    learning_rate: float
    epochs: int
    held_out: float = 0.0

    def identity(self) -> dict[str, Any]:
        """Plain values that determine the result; where the data lies does not."""
        values = dataclasses.asdict(self) | {"format": FORMAT}
        del values["source"]
        return values

    @property
    def file_name(self) -> str:
        """Readable, and different for different settings."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        kind = "choose" if self.held_out else "trial"
        one = self.classifier
        name = f"{short_name(self.source)}-{one.attention.replace(' ', '')}-d{one.head_dim}"
        return f"{kind}-{name}-lr{self.learning_rate:g}-seed{self.seed}-{digest}.json"


def short_name(source: str) -> str:
    """The last part of a hub id or a path."""
    return source.rstrip("/").rpartition("/")[2] or source


def read_attention(name: str) -> float | None:
    """The alpha of "1.2" or "fna:1.2", or None for "dot".

    Raises:
        UserError: for anything else.
    """
    if name == DOT:
        return None
    try:
        alpha = float(name.removeprefix("fna:").removeprefix("alpha="))
    except ValueError as error:
        raise UserError(
            f"an attention is dot, or an alpha from 1 to 2 such as 1.2, got {name!r}"
        ) from error
    if not math.isfinite(alpha):
        raise UserError(f"alpha must be a number from 1 to 2, got {name!r}")
    return DistanceKernel(alpha).alpha
