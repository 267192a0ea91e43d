"""What a search is asked for, checked before a model is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError, choice
from sa_patch.evaluation.calibration.options import read_share
from sa_patch.files.content_hash import file_sha256
from sa_patch.files.provenance import versions
from sa_patch.kernels import check_backend
from sa_patch.kernels.visited_keys import visited_share
from sa_patch.models.embedded import ModelSource, resolve_model
from sa_patch.models.layer_check import check_context, queries_per_key
from sa_patch.models.loading import DTYPES
from sa_patch.patterns import fit_budget, flops_share
from sa_patch.patterns.base import whole_number

COSTS = ("flops", "visited")
SHORTEST_DOCUMENT = 128
# Raised when candidates, texts or scores change: a study of an earlier one cannot be gone on with.
EDITION = 4


@dataclass(frozen=True)
class Options:
    """What a search is asked for.

    Args:
        model: hub id, folder, or ``smollm2-135m``.
        share: of full attention's cost, as text: ``1/8`` or ``0.125``.
        n: tokens of a document.
        cost: "flops", choosing included, or "visited" for the keys that a tile of queries reads.
        trials: candidates that are measured, beside the named methods.
        layer_trials: ways to share the budget out over the layers, measured afterwards.
        documents: of each kind, to search on.
        held_out: of each kind, for the comparison at the end; at least as many.
        text: a file to take language from; None for Python's own sources.
        seed: of the search.
        out: the folder of the study and of what it found.
    """

    model: str
    share: str = "1/8"
    n: int = 4096
    cost: str = "flops"
    trials: int = 30
    layer_trials: int = 0
    documents: int = 4
    held_out: int = 8
    text: Path | None = None
    seed: int = 0
    out: Path | None = None
    dtype: str = "auto"
    device_map: str | None = None
    backend: str = "auto"
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def budget(self) -> float:
        """The share as a number.

        Raises:
            UserError: if it is none above 0 and below 1.
        """
        return read_share(self.share)

    @property
    def folder(self) -> Path:
        name = Path(self.model).expanduser().resolve().name
        share = self.share.replace(" ", "").replace("/", "_")
        return self.out or Path("runs") / f"search-{name}-{self.n}-{self.cost}-{share}"

    def check(self) -> ModelSource:
        """Check all that can be checked without the model.

        Returns:
            Where the model is.

        Raises:
            UserError: for anything that is not allowed.
        """
        whole_number(self.n, "--n", SHORTEST_DOCUMENT)
        whole_number(self.trials, "--trials", 1)
        whole_number(self.layer_trials, "--layer-trials", 0)
        whole_number(self.documents, "--documents", 1)
        whole_number(self.held_out, "--held-out", self.documents)
        choice(self.cost, "cost", COSTS)
        choice(self.dtype, "dtype", DTYPES)
        check_backend(self.backend)
        self.budget  # noqa: B018
        if self.text is not None and not self.text.is_file():
            raise UserError(f"no text file {self.text}; give the path of a UTF-8 text")
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is no folder; give another")
        if importlib.util.find_spec("optuna") is None:
            raise UserError("a search needs Optuna; install it: pip install 'sa_patch[search]'")
        source = resolve_model(self.model, self.gguf_file, self.revision)
        check_context(source, self.n)
        # The leanest of all: where it does not fit, nothing does.
        spent = visited_share if self.cost == "visited" else flops_share
        group = queries_per_key(source)
        if group is not None:
            fit_budget("sinks:4+swa:{}", self.n, self.budget, group, spent)
        return source

    def settings(self, source: ModelSource) -> dict[str, Any]:
        """All that a trial's result depends on, so that a study goes on only with its own."""
        names = ("cost", "n", "documents", "seed", "dtype", "backend")
        installed = versions()
        return {
            "edition": EDITION,
            "model": source.identity,
            "share": self.budget,
            "text": None if self.text is None else file_sha256(self.text),
            **{name: getattr(self, name) for name in names},
            "versions": {name: installed[name] for name in ("sa_patch", "torch", "transformers")},
        }
