"""What is compared, what a classifier and its training are, and the names of trials' files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sa_patch.errors import UserError
from sa_patch.files.settings import LISTED, Positive, Settings
from sa_patch.training.fractional.distance_kernel import DistanceKernel

DOT = "dot"
# Of a trial's file; files of another are made again.
FORMAT = 2
# Seeds to choose by are others than those of the trials that count.
_FIRST_CHOOSING_SEED = 1000
Rate = Annotated[float, Field(gt=0)]


class Classifier(Settings):
    """Sizes and attention of a text classifier, and how it is trained but for rate and epochs.

    Args:
        alpha: of fractional attention, 1 to 2; None for dot-product attention.
        layers, heads, head_dim: its size; the width is ``heads * head_dim``.
        geometry, bandwidth, density, shared, orthonormal: see `FractionalAttention`.
        max_length: words that are read of a text, from its start.
        vocabulary: words at most, the most frequent of the training texts.
        batch: texts of a step of AdamW.
        dropout: of embeddings and of what a layer adds.
    """

    alpha: float | None
    head_dim: Positive
    layers: Positive = 1
    heads: Positive = 1
    geometry: str = "euclidean"
    bandwidth: float | Literal["median"] = 1.0
    density: float = 0.0
    shared: bool = False
    orthonormal: bool = False
    max_length: Positive = 256
    vocabulary: int = Field(default=20_000, ge=3)
    batch: Positive = 32
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_kernel(self) -> Self:
        alpha = 2 if self.alpha is None else self.alpha
        kernel = DistanceKernel(alpha, self.geometry, self.bandwidth, self.density)
        kernel.check_head_dim(self.head_dim)
        return self

    @property
    def attention(self) -> str:
        """ "dot", or "fna" with its alpha."""
        return DOT if self.alpha is None else f"fna {DistanceKernel(self.alpha).alpha_text}"


class Trial(Settings):
    """One training.

    Args:
        source, fingerprint: of the data set.
        seed: of the weights, the order of the texts and, where a part is held out, of that.
        learning_rate: of AdamW, after a linear rise over the first steps.
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
        return self.model_dump(exclude={"source"}) | {"format": FORMAT}

    @property
    def file_name(self) -> str:
        """Readable, and different for different settings."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        kind = "choose" if self.held_out else "trial"
        one = self.classifier
        name = f"{short_name(self.source)}-{one.attention.replace(' ', '')}-d{one.head_dim}"
        return f"{kind}-{name}-lr{self.learning_rate:g}-seed{self.seed}-{digest}.json"


class Plan(Settings):
    """What is compared, and how.

    Args:
        classifiers: those that are compared on each data set.
        trials: of each, with the seeds ``0 .. trials - 1``.
        learning_rates, epochs, choosing, held_out: the rates that are tried, the most epochs, how
            many times, and the share of the training texts that is held out for it.
    """

    classifiers: Annotated[tuple[Classifier, ...], LISTED]
    trials: Positive
    learning_rates: Annotated[tuple[Rate, ...], LISTED]
    epochs: Positive
    choosing: Positive
    held_out: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _check_classifiers(self) -> Self:
        if len(set(self.classifiers)) < len(self.classifiers):
            raise UserError("attention and head_dim must hold different values")
        return self

    def trials_of(
        self,
        source: str,
        fingerprint: str,
        classifier: Classifier,
        chosen: Mapping[str, Any] | None = None,
    ) -> list[Trial]:
        """The trials of a classifier that count, with the learning rate and epochs that were
        chosen; without these, the trials to choose by, which read no test text."""
        if chosen is None:
            seeds = range(_FIRST_CHOOSING_SEED, _FIRST_CHOOSING_SEED + self.choosing)
            rates, epochs, held_out = self.learning_rates, self.epochs, self.held_out
        else:
            seeds = range(self.trials)
            rates, epochs, held_out = (chosen["learning_rate"],), chosen["epochs"], 0.0
        return [
            Trial(
                source=source,
                fingerprint=fingerprint,
                classifier=classifier,
                seed=seed,
                learning_rate=rate,
                epochs=epochs,
                held_out=held_out,
            )
            for seed, rate in product(seeds, rates)
        ]

    def notes(self) -> list[str]:
        """How it is done, in sentences."""
        one = self.classifiers[0]
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        several = self.choosing > 1
        by = f"mean accuracy of {self.choosing} seeds" if several else "accuracy of one seed"
        return [
            f"Mean ± standard deviation over {self.trials} trials (seeds of weights and order).",
            f"Texts are cut to {one.max_length} words, batches hold {one.batch} texts.",
            f"Learning rate ({rates}) and epochs (1 to {self.epochs}) are chosen for each "
            f"classifier alike, by the {by} on "
            f"{self.held_out:.0%} of the training texts; test texts are read once, at the end.",
        ]


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
    DistanceKernel(alpha)
    return alpha
