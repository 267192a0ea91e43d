"""What a calibration is asked for, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa_patch.errors import UserError, choice
from sa_patch.evaluation.calibration.measurement import check_budget
from sa_patch.evaluation.calibration.schedule_file import check_schedule_file
from sa_patch.evaluation.calibration.thresholds import COSTS, check_family
from sa_patch.files.settings import read_fraction
from sa_patch.kernels import check_backend
from sa_patch.models.embedded import ModelSource, resolve_model
from sa_patch.models.layer_check import (
    check_context,
    check_layers,
    check_own_windows,
    usual_layers,
)
from sa_patch.models.loading import DTYPES
from sa_patch.patching import Schedule
from sa_patch.patterns import ByHead, Full, Pattern, parse_pattern, seed_of, with_seed
from sa_patch.patterns.base import whole_number

DEFAULT_METHOD = "sinks:4+swa:60+sa:64"
# What DuoAttention (2410.10819) gives heads that do not retrieve, of smaller numbers.
DEFAULT_STREAMING = "sinks:4+swa:252"
SHORTEST_DOCUMENT = 16


@dataclass(frozen=True)
class Options:
    """What a calibration is asked for: of layers, or with `full_heads` of heads, or with `share`
    of the number in a pattern.

    Args:
        model: hub id, folder, or ``smollm2-135m``.
        method: text form of the pattern of sparse layers or heads, None for a usual one; with
            ``{}`` for the number that `share` decides.
        full_layers: how many of the candidates stay full; None for one in five.
        full_heads: how many KV heads of the whole model stay full.
        share: of full attention's cost, as text: ``1/8`` or ``0.125``.
        cost: what `share` is of, "flops" or "visited".
        n: tokens of a document.
        documents: of each kind.
        text: a file to take documents from; None for generated ones and Python's own sources.
        seeds: of a random pattern, as text such as ``"0,1,2"``, over which losses are averaged;
            None for the method's own.
        layers: the candidates, as text; None for all. Other layers stay full beside the budget.
        compare: also measure rival schedules, on documents of their own.
        out: the schedule file; the measurements lie beside it, as JSON.
    """

    model: str
    method: str | None = None
    full_layers: int | None = None
    full_heads: int | None = None
    share: str | None = None
    cost: str = "flops"
    n: int = 1024
    documents: int = 4
    text: Path | None = None
    seeds: str | None = None
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
        usual = DEFAULT_METHOD if self.full_heads is None else DEFAULT_STREAMING
        return parse_pattern(usual if self.method is None else self.method)

    @property
    def budget(self) -> float:
        """The share as a number.

        Raises:
            UserError: if it is none above 0 and below 1.
        """
        return read_share(self.share or "")

    @property
    def candidates(self) -> list[int] | None:
        """The layers that may go sparse, None for all."""
        return None if self.layers is None else list(Schedule.read(self.layers).named)

    @property
    def patterns(self) -> list[Pattern]:
        """The pattern with every seed, equal seeds once."""
        if self.seeds is None:
            return [self.pattern]
        parts = [part.strip() for part in self.seeds.split(",") if part.strip()]
        if not parts or not all(part.removeprefix("-").isdecimal() for part in parts):
            raise UserError(f"--seeds are whole numbers such as 0,1,2; got {self.seeds!r}")
        if seed_of(self.pattern) is None:
            raise UserError(f"{self.pattern} draws nothing at random, so leave --seeds out")
        return [with_seed(self.pattern, seed) for seed in dict.fromkeys(map(int, parts))]

    @property
    def schedule_file(self) -> Path:
        if self.out is None:
            # A folder may be named "." or "..".
            kind = "schedule" if self.full_heads is None else "heads"
            kind = kind if self.share is None else "pattern"
            return Path("runs") / f"{kind}-{Path(self.model).expanduser().resolve().name}.yaml"
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
        self._check_kind()
        whole_number(self.n, "--n", SHORTEST_DOCUMENT)
        whole_number(self.documents, "--documents", 1)
        choice(self.dtype, "dtype", DTYPES)
        check_backend(self.backend)
        if self.text is not None and not self.text.is_file():
            raise UserError(f"no text file {self.text}; give the path of a UTF-8 text")
        of_layers = self.share is None and self.full_heads is None
        if of_layers and all(pattern.saturated(self.n) for pattern in self.patterns):
            raise UserError(
                f"--method {self.pattern} leaves nothing out of {self.n} tokens, so that no layer "
                "would be harmed; give a larger --n or a sparser --method"
            )
        check_schedule_file(self.schedule_file)
        candidates = self.candidates
        source = resolve_model(self.model, self.gguf_file, self.revision)
        check_layers(source, candidates)
        check_context(source, self.n)
        check_own_windows(source, candidates or (), self.n)
        known = candidates or usual_layers(source)
        if known and of_layers:
            check_budget(self.full_layers, known)
        return source

    def _check_kind(self) -> None:
        """Check that the settings are of one calibration, and the pattern is one for it."""
        kinds = {
            "--full-layers": self.full_layers,
            "--full-heads": self.full_heads,
            "--share": self.share,
        }
        given = [flag for flag, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} do not go together; give one of them")
        if self.share is None and isinstance(self.pattern, Full):
            raise UserError("--method full leaves nothing to calibrate; name a sparse pattern")
        if self.share is not None or self.full_heads is not None:
            of_layers = {"--compare": self.compare, "--seeds": self.seeds, "--layers": self.layers}
            unused = [flag for flag, value in of_layers.items() if value not in (None, False)]
            if unused:
                raise UserError(f"{unused[0]} is for the calibration of layers; leave it out")
        choice(self.cost, "cost", tuple(COSTS))
        if self.share is not None:
            self.budget  # noqa: B018
            check_family("" if self.method is None else self.method)
        elif self.full_heads is not None:
            whole_number(self.full_heads, "--full-heads", 1)
            if self.text is not None:
                raise UserError(
                    "--full-heads needs texts that hide what they ask for, and makes them itself; "
                    "leave --text out"
                )
            ByHead((self.pattern, Full()))


def read_share(text: str) -> float:
    """A part of full attention's cost, written ``1/8`` or ``0.125``.

    Raises:
        UserError: if it is none above 0 and below 1.
    """
    share = read_fraction(text)
    if not 0 < share < 1:
        raise UserError(
            "--share is a part of full attention's cost, above 0 and below 1, such as 1/8 or "
            f"0.125; got {text!r}"
        )
    return share
