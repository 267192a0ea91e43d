"""What a calibration is asked for, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa_patch.errors import UserError
from sa_patch.harness.config import DTYPES
from sa_patch.harness.embedded import ModelSource, resolve_model
from sa_patch.harness.layer_check import check_context, check_layers, layer_count
from sa_patch.harness.schedules import check_budget
from sa_patch.harness.yaml_values import choice
from sa_patch.kernels import check_backend
from sa_patch.patching import Schedule
from sa_patch.patterns import Full, Pattern, parse_pattern
from sa_patch.patterns.base import whole_number

DEFAULT_METHOD = "sinks:4+swa:60+sa:64"
SHORTEST_DOCUMENT = 16


@dataclass(frozen=True)
class Options:
    """What a calibration is asked for.

    Args:
        model: hub id, folder, or ``smollm2-135m``.
        method: text form of the sparse layers' pattern.
        full_layers: how many of the candidates stay full; None for one in five.
        n: tokens of a document.
        documents: of each kind.
        text: a file to take documents from; None for generated ones and Python's own sources.
        seeds: of a random pattern, as text such as ``"0,1,2"``.
        layers: the candidates, as text; None for all. Other layers stay full beside the budget.
        compare: also measure rival schedules, on documents of their own.
        out: the schedule file; the measurements lie beside it, as JSON.
    """

    model: str
    method: str = DEFAULT_METHOD
    full_layers: int | None = None
    n: int = 1024
    documents: int = 4
    text: Path | None = None
    seeds: str = "0"
    layers: str | None = None
    compare: bool = False
    out: Path | None = None
    dtype: str = "auto"
    device_map: str | None = None
    backend: str = "auto"
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def pattern(self) -> Pattern:
        return parse_pattern(self.method)

    @property
    def candidates(self) -> list[int] | None:
        """The layers that may go sparse, None for all."""
        return None if self.layers is None else list(Schedule.read(self.layers).named)

    @property
    def seed_list(self) -> list[int]:
        parts = [part.strip() for part in self.seeds.split(",") if part.strip()]
        if not parts or not all(part.removeprefix("-").isdigit() for part in parts):
            raise UserError(f"--seeds are whole numbers such as 0,1,2; got {self.seeds!r}")
        return [int(part) for part in parts]

    @property
    def schedule_file(self) -> Path:
        if self.out is None:
            return Path("runs") / f"schedule-{Path(self.model).name}.yaml"
        if self.out.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"--out {self.out} must end in .yaml, so that it is taken for a schedule"
            )
        return self.out

    def check(self) -> ModelSource:
        """Check all that can be checked without the model.

        Returns:
            Where the model is.

        Raises:
            UserError: for anything that is not allowed.
        """
        if isinstance(self.pattern, Full):
            raise UserError("--method full leaves nothing to calibrate; name a sparse pattern")
        whole_number(self.n, "--n", SHORTEST_DOCUMENT)
        whole_number(self.documents, "--documents", 1)
        choice(self.dtype, "dtype", DTYPES)
        check_backend(self.backend)
        if self.text is not None and not self.text.is_file():
            raise UserError(f"no text file {self.text}; give the path of a UTF-8 text")
        candidates, _, _ = self.candidates, self.seed_list, self.schedule_file
        source = resolve_model(self.model, self.gguf_file, self.revision)
        check_layers(source, candidates)
        check_context(source, self.n)
        known = candidates or range(layer_count(source) or 0)
        if known:
            check_budget(self.full_layers, known)
        return source
